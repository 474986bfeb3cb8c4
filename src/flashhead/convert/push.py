"""Upload a converted folder to the hub, the model's files and no others.

huggingface_hub does the uploading (`create_repo`, `upload_folder`: chunked, resumed when called
again, several commits where a folder is large). Here it is decided what is sent: files that the
model needs, by name; links out of the folder are refused, the rest is left out and listed.
"""

import dataclasses
import glob
from pathlib import Path
from typing import Any

from flashhead.convert.files import ModelFiles, model_files
from flashhead.errors import FlashHeadError


@dataclasses.dataclass(frozen=True)
class Plan:
    """What would be sent, and where.

    Args:
        folder: the model's.
        repo: `owner/name`, or `name` for the token's owner.
        revision: branch, or None for the main one.
        endpoint: the hub's address.
        files: bytes by name, in order.
        left_out: files that are not sent, each with the reason.
    """

    folder: Path
    repo: str
    revision: str | None
    endpoint: str
    files: dict[str, int]
    left_out: dict[str, str]

    @property
    def total_bytes(self) -> int:
        """Of all files that are sent."""
        return sum(self.files.values())


def plan_push(folder: Path, repo: str, revision: str | None = None) -> Plan:
    """Decide what is sent; nothing is.

    Args:
        folder: what `flashhead convert` wrote.
        repo: of the hub.
        revision: branch to commit to; made if it does not exist.

    Raises:
        FlashHeadError: no name of a repository, a partial folder, or a link that leaves it.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise FlashHeadError(f"repository {repo!r}: wanted owner/name ({error})") from error
    whole = folder.resolve()
    if ".partial" in whole.name or ".partial" in whole.parent.name:
        raise FlashHeadError(f"{folder}: left by a conversion that did not finish")
    found = model_files(folder)
    _refuse_links(folder, found)
    files = {name: (folder / name).stat().st_size for name in found.kept}
    return Plan(folder, repo, revision, constants.ENDPOINT, files, found.left_out)


def push(plan: Plan, *, private: bool = False, token: str | None = None) -> dict[str, Any]:
    """Send what the plan names.

    Args:
        plan: of `plan_push`.
        private: make the repository private, if it is made now.
        token: of the hub; None: the one that is logged in.

    Returns:
        JSON-able: `url` of the repository, `commit` with its id and address.

    Raises:
        FlashHeadError: the hub refuses or does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    http_error: type[BaseException] = HfHubHTTPError.__bases__[0]  # of the hub's HTTP library
    api = HfApi(endpoint=plan.endpoint, token=token)
    try:
        url = api.create_repo(plan.repo, private=private or None, exist_ok=True)
        if plan.revision is not None:
            api.create_branch(url.repo_id, branch=plan.revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=url.repo_id,
            folder_path=plan.folder,
            revision=plan.revision,
            allow_patterns=[glob.escape(name) for name in plan.files],
            commit_message=f"Upload {plan.folder.resolve().name}",
        )
    except (OSError, RuntimeError, ValueError, http_error) as error:
        raise FlashHeadError(_refused(plan, error, token)) from error
    return {"url": str(url), "commit": commit.oid, "commit_url": commit.commit_url}


def _refuse_links(folder: Path, found: ModelFiles) -> None:
    root = folder.resolve()
    for name in (*found.kept, *found.left_out):
        path = folder / name
        if not path.is_symlink():
            continue
        if not path.resolve().is_relative_to(root):
            raise FlashHeadError(f"{name}: a link to outside of {folder}: copy the file into it")
        if name in found.kept and not path.is_file():
            raise FlashHeadError(f"{name}: a link to nothing, or to a folder")


def _refused(plan: Plan, error: BaseException, token: str | None) -> str:
    """One line, which never holds the token."""
    cause: BaseException | None = error
    status = None
    while cause is not None and status is None:  # uploads wrap the hub's answer
        status = getattr(getattr(cause, "response", None), "status_code", None)
        cause = cause.__cause__
    hints = {
        401: "not logged in, or a token that is not valid: hf auth login, or --token-file",
        403: "the token may not write there",
        404: "no such repository or branch, or the token may not see it",
    }
    said = hints.get(status or 0) or " ".join(str(error).split())[:300] or type(error).__name__
    if token:
        said = said.replace(token, "***")
    answer = f"the hub answered {status}" if status else "no upload"
    return f"{plan.endpoint}/{plan.repo}: {answer}: {said}"
