"""Real W4A16 variants: made, verified against their base, and chatted with, as a user does.

`tests/engines/test_variants.py` serves them by vLLM.
"""

import pytest
import variants


@pytest.mark.model
@pytest.mark.parametrize("name", variants.SOURCES)
def test_a_variant_is_made_verified_and_chatted_with(name, tmp_path):
    """Catches a folder that one command writes and the next does not take."""
    source, out = variants.source_of(name), tmp_path / "variant"
    report = variants.make(source, out)
    assert report["quantize"]["kind"] == "w4a16"
    assert report["folder_bytes"] < 0.8 * report["model_bytes"]
    variants.require_verified(out, source)
    variants.require_chats(out)
