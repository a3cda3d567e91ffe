"""The HTML report in a real browser: what it shows, without a script, a request, or a bar to scroll sideways."""

from __future__ import annotations

import http.server
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fused_gopd.html import ScoredText, render_report
from fused_gopd.html.colours import LEVELS, palette
from fused_gopd.html.texts import token_text, visible
from fused_gopd.pictures import DARK, PAGE
from report_texts import HOSTILE, hostile_report, rows, scored

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

TOKENS = ["The", " sky", " is", " blue", " be", "cause", ".\n", " End"]  # advantages: -1.5, -1, -0.5, 0, ..., 2


def report(**changes: Any) -> dict[str, Any]:
    after = scored(TOKENS, shift=1.0)
    return {
        "title": "a run",
        "settings": [("student", "smollm2"), ("torch", "2.13.0")],
        "rows": rows(5),
        "samples": {"before": [scored(TOKENS)], "after, step 5": [after]},
        "warnings": ["30 % of the answers were cut off"],
        **changes,
    }


def readout(page: Any, token: int) -> str | None:
    """What the bottom of the window shows of a token; None where it shows nothing."""
    content = page.evaluate(f"getComputedStyle(document.querySelectorAll('.t')[{token}], '::after').content")
    return None if content in ("none", "normal") else content.replace("\u00a0", " ")


def background(page: Any, selector: str, number: int = 0) -> str:
    colour = page.evaluate(f"getComputedStyle(document.querySelectorAll('{selector}')[{number}]).backgroundColor")
    return str(colour)


def css(colour: str) -> str:
    return f"rgb({', '.join(map(str, bytes.fromhex(colour[1:])))})"


def width_of(page: Any) -> int:
    return int(page.evaluate("document.documentElement.scrollWidth"))


def test_a_page_without_javascript_shows_all_that_it_has(show: Any) -> None:
    page = show(report(), java_script_enabled=False)
    assert page.title() == page.locator("h1").inner_text() == "a run"
    assert page.locator("html").get_attribute("lang") == "en"
    assert page.locator("h2").all_inner_texts() == ["Curves", "Curves by route", "Texts by token", "Settings"]
    assert page.locator(".warnings").inner_text() == "Warning: 30 % of the answers were cut off"
    assert [figure.locator("strong").inner_text() for figure in page.locator("figure").all()] == [
        "Reward, log q − log r",
        "Loss",
        "odd",
        "Reward, log q − log r",
    ]
    for picture in page.locator("img").all():
        assert picture.evaluate("image => image.complete && image.naturalWidth > 300")
        assert picture.get_attribute("alt")
    assert page.locator("figure").first.inner_text().splitlines()[-1] == "reward: 0 → 1.609"
    assert page.locator("h3").inner_text() == "prompt 1"
    assert page.locator(".prompt").inner_text() == "Why?"
    assert [heading.inner_text() for heading in page.locator("h4").all()] == ["before", "after, step 5"]
    for text in page.locator(".text").all():
        assert text.inner_text() == "The sky is blue because.↵\n End"
    boxes = [card.bounding_box() for card in page.locator(".card").all()]
    assert boxes[0]["y"] == boxes[1]["y"], "before and after stand side by side"
    assert page.locator("dl").inner_text().split() == ["student", "smollm2", "torch", "2.13.0"]


def test_the_chosen_number_colours_the_tokens_as_its_legend_says(show: Any) -> None:
    page = show(report(), java_script_enabled=False)
    # the 95th percentile of the 16 |A| is the largest, 2: nine levels of 0.5
    levels = palette("light", True)
    for i in range(len(TOKENS)):
        assert background(page, ".t", i) == css(levels[i + 1])
    labels = page.locator(".scale-a li")
    assert labels.all_inner_texts() == ["≤ −2", "−1.5", "−1", "−0.5", "0", "+0.5", "+1", "+1.5", "≥ +2"]
    assert [background(page, ".scale-a li", i) for i in range(LEVELS)] == [css(level) for level in levels]
    assert [page.locator(f".scale-{key}").is_visible() for key in "arde"] == [True, False, False, False]
    page.get_by_role("radio", name="entropy H of the student").check()
    assert [page.locator(f".scale-{key}").is_visible() for key in "arde"] == [False, False, False, True]
    for i in range(len(TOKENS)):  # H = i/4, of nine levels of 0.25
        assert background(page, ".t", i) == css(palette("light", False)[i])
    page.get_by_role("radio", name="none").check()
    assert {background(page, ".t", i) for i in range(len(TOKENS))} == {"rgba(0, 0, 0, 0)"}


def test_pointer_keyboard_and_touch_show_the_numbers_of_a_token(show: Any) -> None:
    expected = "6: “cause”\\a log p −0.5   log q 1.5   log r −0.5   A +1   log q − log r +2   log q − log p +2   H 1.25"
    page = show(report(), java_script_enabled=False)
    assert readout(page, 5) is None
    page.locator(".t").nth(5).hover()
    assert readout(page, 5) == f'"{expected}"'
    page.mouse.move(0, 0)
    assert readout(page, 5) is None
    page.get_by_role("radio", name="none").focus()
    page.keyboard.press("Tab")  # the prompt's summary
    page.keyboard.press("Tab")  # the prompt, which may have to be scrolled
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip 8 tokens"
    for _ in range(6):
        page.keyboard.press("Tab")
    assert readout(page, 5) == f'"{expected}"'
    touched = show(report(), java_script_enabled=False, width=360, has_touch=True, is_mobile=True)
    touched.locator(".t").nth(5).tap()
    assert readout(touched, 5) == f'"{expected}"'
    # all of it is inside the window
    bar = "getComputedStyle(document.querySelectorAll('.t')[5], '::after')"
    assert touched.evaluate(f"[{bar}.position, {bar}.bottom, {bar}.left, {bar}.right]") == ["fixed", *["0px"] * 3]
    assert width_of(touched) == 360


def test_dark_mode_reaches_page_tokens_and_pictures(show: Any) -> None:
    for scheme, page_colour in (("light", PAGE), ("dark", DARK[PAGE])):
        page = show(report(), color_scheme=scheme, java_script_enabled=False)
        assert background(page, "body") == css(page_colour)
        assert background(page, ".t", 7) == css(palette(scheme, True)[8])
        # the corner of a curve's picture, as painted
        corner = pixel(page.locator("img").first.screenshot())
        assert corner == tuple(bytes.fromhex(page_colour[1:]))


def pixel(png: bytes) -> tuple[int, ...]:
    """The pixel near the upper right corner of a picture."""
    from matplotlib.image import imread

    return tuple(round(255 * float(x)) for x in imread(io.BytesIO(png))[2, -3, :3])


@pytest.mark.parametrize("width", [360, 1200])
def test_hostile_texts_are_shown_and_nothing_of_them_runs(show: Any, width: int) -> None:
    page = show(hostile_report(), width=width)
    assert width_of(page) == width, "nothing to scroll sideways"
    assert page.title() != "run"
    assert page.locator("h1").count() == 1
    assert page.locator("h1").inner_text().startswith("<script>document.title='run'</script><img src=x")
    shown = page.locator(".t").all_text_contents()
    assert shown == 2 * [token_text(token).removesuffix("\n") for token in HOSTILE]
    texts = page.locator(".prompt").all_text_contents()
    assert texts == [visible("".join(HOSTILE)), visible("".join(HOSTILE)) + "other"]
    page.locator(".t").first.hover()
    assert "<script>document.title='run'</script>" in str(readout(page, 0))
    assert page.evaluate("document.scripts.length") == 0


def test_text_from_right_to_left_stays_in_its_line(show: Any) -> None:
    """Arabic runs from right to left in its own line, and the numbers behind the text are where they are without it."""
    tokens = ["سلام", " عالم", "\n", "\u202e", "abc"]
    page = show(report(samples={"before": [scored(tokens, title="\u202etitle \u05d0", prompt="\u202e")]}), width=600)
    first, second = (page.locator(".t").nth(i).bounding_box() for i in range(2))
    assert second["x"] < first["x"]
    box = page.locator(".text").bounding_box()
    assert first["x"] + first["width"] > box["x"] + 0.9 * box["width"], "a line of Arabic begins on the right"
    fourth, fifth = (page.locator(".t").nth(i).bounding_box() for i in (3, 4))
    assert fourth["x"] < fifth["x"], "the override is shown, and turns nothing round"
    assert fourth["x"] < 60, "a line of Latin letters begins on the left"
    assert page.locator(".t").nth(3).inner_text() == "⟨U+202E⟩"
    assert page.locator(".card .muted").bounding_box()["x"] < 60


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """An address of this machine, and the paths that have been asked for there."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as started:
        threading.Thread(target=started.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{started.server_port}", asked
        started.shutdown()


@pytest.mark.parametrize("policy", [True, False])
def test_the_policy_forbids_scripts_and_requests(
    browser: Any, server: tuple[str, list[str]], tmp_path: Path, policy: bool
) -> None:
    """Of markup that somebody were to find a way for; without the policy, all of it does what it is there for."""
    url, asked = server
    text = render_report(**report())
    head, meta, rest = text.partition('<meta http-equiv="Content-Security-Policy"')
    assert meta
    content, end, rest = rest.partition(">")
    markup = f"""
        <script>document.title = 'run'</script><h5 onclick="document.title += ' clicked'">click</h5>
        <img src="{url}/image"><link rel="stylesheet" href="{url}/style"><iframe src="{url}/frame"></iframe>
        <style>@import "{url}/import"; h5 {{ background: url({url}/background) }}</style>
        <form action="{url}/form"><button>send</button></form>"""
    text = (head + meta + content + end if policy else head) + rest.replace("</main>", f"</main>{markup}")
    (tmp_path / "report.html").write_text(text, encoding="utf-8")
    page = browser.new_page()
    page.goto((tmp_path / "report.html").as_uri())
    page.locator("h5").click()
    assert page.title() == ("a run" if policy else "run clicked")
    page.get_by_role("button").click(no_wait_after=True)
    page.wait_for_timeout(300)
    page.close()
    assert {path.rstrip("?") for path in asked} - {"/favicon.ico"} == (
        set() if policy else {"/image", "/style", "/frame", "/import", "/background", "/form"}
    )


def test_a_narrow_window_shows_one_text_below_the_other(show: Any) -> None:
    long = [("checksum", "0f" * 40), ("a long name of a setting " * 4, "word " * 100)]
    page = show(report(settings=long), width=360, java_script_enabled=False)
    assert width_of(page) == 360
    before, after = (card.bounding_box() for card in page.locator(".card").all())
    assert before["y"] + before["height"] <= after["y"]
    for box in (element.bounding_box() for element in page.locator("figure, fieldset, dd, .text, label").all()):
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360


def test_print_has_the_colours_of_paper_and_the_chosen_legend(show: Any) -> None:
    page = show(report(), java_script_enabled=False, color_scheme="dark")
    page.locator(".t").nth(5).focus()
    page.emulate_media(media="print")
    assert (
        readout(page, 5) is None
        or page.evaluate("getComputedStyle(document.querySelectorAll('.t')[5], '::after').display") == "none"
    )
    assert page.locator("label").all_inner_texts()[0].strip() == "advantage A"
    assert [label.is_visible() for label in page.locator("label").all()] == [True, *[False] * 5]
    assert page.locator(".scale-a").is_visible()
    assert page.evaluate("getComputedStyle(document.querySelector('.t')).printColorAdjust") == "exact"
    assert background(page, "body") == css(PAGE)
    assert background(page, ".t", 7) == css(palette("light", True)[8])
    assert page.pdf().startswith(b"%PDF")


def test_a_text_of_100_000_tokens_opens(show: Any) -> None:
    tokens = [" word", " a", ".\n", " and"] * 25_000
    sample = ScoredText(title="long", prompt="p", tokens=tokens, entropy=[i % 7 / 2 for i in range(len(tokens))])
    page = show(report(samples={"before": [sample]}), width=360, java_script_enabled=False)
    assert page.locator(".t").count() == 100_000
    assert width_of(page) == 360
    page.locator(".t").nth(99_999).scroll_into_view_if_needed()
    page.locator(".t").nth(99_999).hover()
    assert readout(page, 99_999) == '"100000: “ and”\\a H 2"'  # half of 99,999 mod 7
