"""The playground's page in a browser."""

from browser import browser_page
from playground_client import serving, wait_until

CONTRAST = """(() => {
  const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map(v => {
    v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const paper = e => { for (; e; e = e.parentElement) {
    const c = getComputedStyle(e).backgroundColor;
    if (c !== "rgba(0, 0, 0, 0)") return light(c); } return 1; };
  const shown = "p, label, h1, h2, dt, dd, button:enabled, textarea, .token, .legend span, summary";
  return Math.min(...[...document.querySelectorAll(shown)].map(e => {
    const ink = light(getComputedStyle(e).color), under = paper(e);
    return (Math.max(ink, under) + 0.05) / (Math.min(ink, under) + 0.05); })); })()"""


def test_in_a_browser(decoder, tmp_path):
    """Catches a page whose own policy blocks it, text that becomes markup, sides that stay empty,
    tokens without figures, a cancel that does nothing, and a page wider than a phone."""
    status = "document.querySelector('#status').textContent"
    click = "document.querySelector('#{}').click()"
    with serving(decoder) as server, browser_page() as tab:

        def wait_for_status(*beginnings):
            wait_until(lambda: tab.evaluate(status).startswith(beginnings))

        for width, dark in ((390, True), (1280, False)):
            tab.open(server.url, width, dark=dark)
            wait_until(lambda: tab.evaluate("!document.querySelector('#run').disabled"))
            tab.evaluate(
                "document.querySelector('#prompt').value = 'w5 w9 <img src=x onerror=alert(1)>';"
                "document.querySelector('#tokens').value = '24';" + click.format("run")
            )
            wait_for_status("Done")
            assert tab.evaluate(status) == "Done: the same 24 tokens."
            for name in ("dense", "flash"):
                assert tab.evaluate(f"document.querySelector('#{name}-text').innerText.length") > 24
                assert "MB a token" in tab.evaluate(
                    f"document.querySelector('#{name}-bytes').textContent"
                )
                assert "tokens/s" in tab.evaluate(
                    f"document.querySelector('#{name}-speed').textContent"
                )
            spans = tab.evaluate(
                "[...document.querySelectorAll('#flash-text .token')].map(e => "
                "[Number(e.dataset.candidates), e.className, e.title])"
            )
            assert len(spans) == 24
            for candidates, classes, title in spans:
                assert 1 <= candidates <= 515
                assert f"{candidates} candidates, certified" in title
                assert "certified" in classes.split()
            colours = tab.evaluate(
                "[...document.querySelectorAll('.legend span')].slice(0, 5).map(e => "
                "getComputedStyle(e).backgroundColor)"
            )
            assert len(set(colours)) == 5
            assert tab.evaluate("document.querySelectorAll('#rows tr').length") == 24
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            assert tab.evaluate(CONTRAST) >= 4.5
            shot = tmp_path / f"{width}.png"
            tab.screenshot(shot)
            assert shot.stat().st_size > 10_000
        tab.evaluate("document.querySelector('#tokens').value = '240';" + click.format("run"))
        wait_until(lambda: tab.evaluate("document.querySelectorAll('#flash-text .token').length"))
        tab.evaluate(click.format("cancel"))
        wait_for_status("Stopped")
        wait_until(lambda: not server.turns._jobs)
        assert tab.evaluate("document.querySelectorAll('#flash-text .token').length") < 240
        assert tab.evaluate("document.querySelectorAll('.text img').length") == 0
        assert tab.problems == []
        assert {url for url in tab.requests if not url.startswith((server.url, "data:"))} == set()


def test_where_texts_part(decoder, monkeypatch):
    """Catches a page that calls different texts the same."""
    dense = decoder._dense

    def other(hidden, sampling, step):
        choice = dense(hidden, sampling, step)
        return choice if step != 3 else type(choice)((choice.token + 1) % 500 + 3, 515, False, 1)

    monkeypatch.setitem(decoder._choosers, "dense", other)
    with serving(decoder) as server, browser_page() as tab:
        tab.open(server.url, 1280)
        wait_until(lambda: tab.evaluate("!document.querySelector('#run').disabled"))
        tab.evaluate(
            "document.querySelector('#prompt').value = 'w5';"
            "document.querySelector('#tokens').value = '8';"
            "document.querySelector('#run').click()"
        )
        wait_until(
            lambda: tab.evaluate("document.querySelector('#status').textContent").startswith("Done")
        )
        said = tab.evaluate("document.querySelector('#status').textContent")
        assert said.startswith("Done: the texts part at token 4: dense")
        assert " in the dense head's float32." in said
        parts = tab.evaluate(
            "['dense', 'flash'].map(s => [...document.querySelectorAll(`#${s}-text .token`)]"
            ".findIndex(e => e.classList.contains('parts')))"
        )
        assert parts == [3, 3]
        assert tab.problems == []
