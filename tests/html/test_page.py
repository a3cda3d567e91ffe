"""The HTML report, read by a parser: its numbers, levels and texts, and that nothing in it is code or an address."""

from __future__ import annotations

import base64
import io
import math
import sys
import unicodedata
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fused_gopd.html import ScoredText, render_report, write_report
from fused_gopd.html.colours import LEVELS, QUANTITIES, Scale, palette, plain, scale_of
from fused_gopd.html.curves import panels
from fused_gopd.html.page import _articles
from fused_gopd.html.texts import _SHOWN, token_text, visible
from fused_gopd.pictures import DARK, INK
from fused_gopd.run_metrics import POINTS, thinned
from report_texts import HOSTILE, hostile_report, rows, scored

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")


class Page(HTMLParser):
    """The elements of a page, and the text of those of a class or tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []  # tag, text
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self._open = tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self._open, data))

    @property
    def tokens(self) -> list[dict[str, str]]:
        return [attrs for tag, attrs in self.elements if tag == "span" and attrs.get("class", "").startswith("t")]


def quantity(key: str) -> Any:
    return next(quantity for quantity in QUANTITIES if quantity.key == key)


# ---------------------------------------------------------------------------------------------------- what is checked


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"tokens": "abc"}, TypeError, "tokens must be a sequence of str, one for each token, got a str"),
        ({"tokens": ["a", 3]}, TypeError, "tokens must be str, got int at 1"),
        ({"title": None}, TypeError, "title must be a str, got NoneType"),
        ({"prompt": ["a"]}, TypeError, "prompt must be a str, got list"),
        ({"teacher_prompt": 1}, TypeError, "teacher_prompt must be a str, got int"),
        ({"teacher": [-1.0]}, ValueError, "teacher must have a number for each of 2 tokens, got 1"),
        ({"entropy": [1.0, None]}, TypeError, "entropy must have numbers"),
    ],
)
def test_a_scored_text_names_what_is_wrong(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ScoredText(**{"title": "a", "prompt": "b", "tokens": ["c", "d"], **fields})


def test_a_scored_text_takes_tensors() -> None:
    import torch

    text = ScoredText(title="a", prompt="b", tokens=("c", "d"), student=torch.tensor([-1.5, -math.inf]))  # type: ignore
    assert text.student == (-1.5, -math.inf)


def test_samples_must_be_scored_texts() -> None:
    with pytest.raises(TypeError, match=r"samples\['before'\] must have ScoredText, got dict"):
        render_report(title="a", samples={"before": [{"title": "b"}]})  # type: ignore


def test_a_report_replaces_the_one_before_it_and_leaves_nothing_else(tmp_path: Path) -> None:
    for title in ("first", "second"):
        write_report(tmp_path / "report.html", title=title)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert "<h1>second</h1>" in (tmp_path / "report.html").read_text(encoding="utf-8")
    with pytest.raises(TypeError):
        write_report(tmp_path / "report.html", title="third", samples={"x": [None]})  # type: ignore
    assert "<h1>second</h1>" in (tmp_path / "report.html").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------- texts


def test_no_character_is_invisible_or_moves_others() -> None:
    """All of Unicode: each is shown as it is or by its code, and what is as it is has a glyph or is part of one."""
    joiners = {"\u200c", "\u200d"} | {chr(i) for i in range(0xE0020, 0xE0080)}
    for i in range(sys.maxunicode + 1):
        character = chr(i)
        shown = visible(character)
        if shown == character:
            kind = unicodedata.category(character)
            assert character in "\n\t" or character in joiners or kind not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
        else:
            assert shown == f"⟨U+{i:04X}⟩"
    _SHOWN.clear()  # it has all of them now


def test_line_breaks_tabs_joiners_and_parts_of_characters_are_seen_as_tokens() -> None:
    assert [token_text(token) for token in ("a\n", "\t", "\u200d", "\ufe0f", "", "👩\u200d💻")] == [
        "a↵\n",
        "⇥\t",
        "⟨U+200D⟩",
        "⟨U+FE0F⟩",
        "⋯",
        "👩\u200d💻",
    ]


def test_hostile_texts_are_texts_and_the_page_has_no_code_and_no_address() -> None:
    text = render_report(**hostile_report())
    page = Page(text)
    allowed = (
        "html head meta title style body main h1 h2 h3 h4 section p strong div figure figcaption small img ul li span"
    )
    allowed += " bdi fieldset legend label input ol article details summary pre a dl dt dd"
    assert {tag for tag, _ in page.elements} <= set(allowed.split())
    for tag, attrs in page.elements:
        assert not [name for name in attrs if name.startswith("on") or name == "srcset"], (tag, attrs)
        assert attrs.get("src", "data:image/svg+xml;base64,").startswith("data:image/svg+xml;base64,")
        assert attrs.get("href", "#").startswith("#")
    (policy,) = [attrs["content"] for tag, attrs in page.elements if attrs.get("http-equiv")]
    assert policy.split("; ")[0] == "default-src 'none'"
    assert "script" not in policy
    css = next(text for tag, text in page.texts if tag == "style")
    assert "url(" not in css
    assert "@import" not in css
    # warnings, titles, prompts, settings: what a reader sees is what was given
    seen = "".join(text for tag, text in page.texts if tag != "style")
    for warning in HOSTILE:
        assert seen.count(visible(warning)) >= 4
    for i, given in enumerate(HOSTILE):
        shown = page.tokens[i]["data-n"]
        assert shown.startswith(
            f"{i + 1}: “{token_text(given)}”\n" if given else f"{i + 1}: a part of the next character\n"
        )
    text.encode()  # no lone surrogate


def test_a_text_of_100_000_tokens_is_whole() -> None:
    tokens = [" a", " token", "\n", "x"] * 25_000
    text = render_report(title="long", samples={"a": [ScoredText(title="b", prompt="c", tokens=tokens)]})
    assert text.count('<span class="t') == 100_000
    assert text.count('<div dir="auto">') == 25_001  # a line for each of the text
    one_line = ScoredText(title="b", prompt="c", tokens=["x"] * 2500)
    assert render_report(title="long", samples={"a": [one_line]}).count('<div dir="auto">') == 3


# ------------------------------------------------------------------------------------------------------------ colours


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2."""
    channels = np.array([*bytes.fromhex(colour[1:])]) / 255
    return float(linear(channels) @ [0.2126, 0.7152, 0.0722])


def linear(channels: Any) -> Any:
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(("mode", "ink"), [("light", INK), ("dark", DARK[INK])])
def test_text_has_contrast_on_every_level(mode: str, ink: str, signed: bool) -> None:
    assert len(palette(mode, signed)) == LEVELS
    for level in palette(mode, signed):
        low, high = sorted((luminance(level), luminance(ink)))
        assert (high + 0.05) / (low + 0.05) >= 4.5


# Viénot, Brettel and Mollon (1999): what protanopes and deuteranopes see of linear RGB
PROTANOPE = np.array([[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]])
DEUTERANOPE = np.array([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]])


def lab(colour: str, seen: Any) -> Any:
    """CIELAB (D65) of a colour as someone sees it."""
    rgb = np.clip(seen @ linear(np.array([*bytes.fromhex(colour[1:])]) / 255), 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ rgb
    f = np.cbrt(np.maximum(xyz / [0.9505, 1, 1.089], 0.008856))
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("seen", [np.eye(3), PROTANOPE, DEUTERANOPE], ids=["all", "protanope", "deuteranope"])
@pytest.mark.parametrize("mode", ["light", "dark"])
def test_positive_and_negative_are_told_apart_by_everyone(mode: str, seen: Any) -> None:
    """Colours whose distance in CIELAB is 10 are told apart at a glance; 2.3 is just noticeable."""
    colours = [lab(colour, seen) for colour in palette(mode, True)]
    for i in range(LEVELS // 2):
        assert np.linalg.norm(colours[i] - colours[LEVELS - 1 - i]) > 10
        assert np.linalg.norm(colours[i] - colours[i + 1]) > 2.3


def test_a_level_is_the_nearest_of_the_numbers_of_the_legend() -> None:
    for key, values in (("a", np.linspace(-9, 9, 1001)), ("e", np.linspace(0, 9, 1001))):
        scale = Scale(quantity(key), 0.5)
        numbers = 0.5 * (np.arange(9) - (4 if key == "a" else 0))
        for value in values:
            distance = np.abs(numbers - value)
            assert distance[scale.level(float(value))] <= distance.min() + 1e-12
    assert Scale(quantity("a"), 0.5).labels() == ["≤ −2", "−1.5", "−1", "−0.5", "0", "+0.5", "+1", "+1.5", "≥ +2"]
    assert Scale(quantity("e"), 0.5).labels() == ["0", "0.5", "1", "1.5", "2", "2.5", "3", "3.5", "≥ 4"]
    assert [Scale(quantity("a"), 1.0).level(x) for x in (math.inf, -math.inf, math.nan)] == [8, 0, None]


def test_a_scale_holds_95_percent_of_all_texts_and_has_round_numbers() -> None:
    text = scored(["a"] * 1000)  # advantage: -1.5 ... 498
    scale = scale_of(quantity("a"), [text])
    assert scale is not None
    assert 4 * scale.unit >= np.quantile(np.abs(text.advantage), 0.95)
    assert scale.unit == 200  # of 1, 2, 2.5, 5 and 10
    assert scale_of(quantity("a"), [scored([])]) is not None
    assert scale_of(quantity("a"), [ScoredText(title="", prompt="", tokens=["a"])]) is None
    flat = scale_of(quantity("a"), [ScoredText(title="", prompt="", tokens=["a", "b"], advantage=[0.0, math.nan])])
    assert flat is not None
    assert flat.level(0.0) == 4


def test_the_numbers_of_a_token_and_their_means() -> None:
    text = scored(list("abcdefg"), shift=0.25)
    page = Page(render_report(title="t", samples={"before": [text]}))
    shown = page.tokens[5]["data-n"].replace("\u00a0", " ")
    assert shown == (
        "6: “f”\nlog p −0.5   log q 1.75   log r −0.5   A +1   log q − log r +2.25   log q − log p +2.25   H 1.25"
    )
    # the largest |A| is 1.5, so that the levels are 0.5 apart
    assert page.tokens[5]["class"].split()[:2] == ["t", "a6"]
    means = "".join(text for _, text in page.texts).replace("\u00a0", " ")
    assert (
        "7 tokens. Means: log p −0.3, log q −0.05, log r −0.5, A 0, log q − log r +0.45, log q − log p +0.25, H 0.75"
        in means
    )


def test_infinite_log_probs_and_models_that_are_not_there() -> None:
    text = ScoredText(title="", prompt="", tokens=["a", "b"], student=[-math.inf, -1], teacher=[-2, -math.inf])
    page = Page(render_report(title="t", samples={"before": [text]}))
    assert [token["data-n"].replace("\u00a0", " ") for token in page.tokens] == [
        "1: “a”\nlog p −∞   log q −2   log q − log p ∞".replace(" ∞", " +∞"),
        "2: “b”\nlog p −1   log q −∞   log q − log p −∞",
    ]
    assert [token["class"] for token in page.tokens] == ["t d8 s8", "t d0 s5"]  # 1 is five times 0.2
    assert [attrs["id"] for tag, attrs in page.elements if tag == "input"] == ["by-d", "by-s", "by-none"]
    unscored = scored(["a", "b"], shift=4)
    unscored = replace(unscored, student=[math.nan, -1], teacher=[math.nan, -2], ref=None, entropy=None, advantage=None)
    page = Page(render_report(title="t", samples={"before": [unscored]}))
    assert page.tokens[0]["class"].split() == ["t"]
    assert page.tokens[0]["data-n"].replace("\u00a0", " ") == "1: “a”\nlog p –   log q –   log q − log p –"
    assert "Means: log p −1, log q −2" in "".join(text for _, text in page.texts).replace("\u00a0", " ")
    bare = ScoredText(title="", prompt="", tokens=["a"])
    assert "fieldset" not in {tag for tag, _ in Page(render_report(title="t", samples={"a": [bare]})).elements}


def test_prompts_that_all_texts_have_are_there_once_and_so_are_those_of_other_readers() -> None:
    before, after = scored(["a"]), replace(scored(["b"]), advantage=[0.5])
    hinted = [replace(text, teacher_prompt="Why? It scatters.") for text in (before, after)]
    for samples, expected in (
        ({"before": [before], "after": [after]}, ["Prompt, 4 characters"]),
        (
            {"before": hinted[:1], "after": hinted[1:]},
            ["Prompt, 4 characters", "Prompt of the teacher, 17 characters"],
        ),
        (
            {"before": [before], "after": hinted[1:]},
            ["Prompt, 4 characters", "Prompt, 4 characters", "Prompt of the teacher, 17 characters"],
        ),
    ):
        page = Page(render_report(title="t", samples=samples))
        assert [text for tag, text in page.texts if tag == "summary" and text.strip()] == expected


def test_samples_of_the_same_prompts_stand_side_by_side() -> None:
    def texts(*prompts: str) -> list[ScoredText]:
        return [scored(["a"], title=f"answer {i}", prompt=prompt) for i, prompt in enumerate(prompts, 1)]

    samples = {
        "before": texts("a", "b"),
        "held out, before": texts("x", "y"),
        "after": texts("b", "c", "d"),
        "held out, after": texts("x", "y"),
    }
    found = list(_articles(samples, []))
    assert [(article.title, [card.name for card in article.cards]) for article in found] == [
        ("answer 1", ["held out, before", "held out, after"]),
        ("answer 2", ["held out, before", "held out, after"]),
        ("answer 1", ["before", "after"]),
        ("answer 2", ["before", "after"]),
        ("answer 3", ["after"]),
    ]
    assert [article.prompts for article in found] == [(("Prompt", x),) if x else None for x in ("x", "y", "", "", "d")]


def test_plain_numbers() -> None:
    values = (0, 1, -0.5, 1234.5, 123.456, 0.00012, 0.01, math.nan, math.inf)
    assert [plain(x) for x in values] == ["0", "1", "−0.5", "1234", "123.456", "0.00012", "0.01", "–", "∞"]


# ------------------------------------------------------------------------------------------------------------- curves


def test_every_metric_has_a_curve_and_those_of_routes_are_together() -> None:
    data = [
        *rows(10),
        {"step": 10, "eval_reward": 0.5, "reward": None, "name": "text", "nothing": None, "loss": math.nan},
    ]
    found = list(panels(data))
    assert [(panel.heading, [curve.label for curve in panel.curves]) for panel in found] == [
        ("Reward, log q − log r", ["reward", "reward, held-out prompts"]),
        ("Loss", ["loss"]),
        ("odd", ["odd"]),
        ("Reward, log q − log r", ["math", "<script>"]),
    ]
    assert [panel.by_route for panel in found] == [False, False, False, True]
    reward, held_out = found[0].curves
    assert reward.points == [*((i, pytest.approx(math.log(i))) for i in range(1, 11)), (10, None)]
    assert (reward.ends, held_out.ends) == ("0 → 2.303", "0.5")
    assert (reward.colour, reward.dashes, held_out.dashes) == (held_out.colour, "solid", "dashed")
    assert found[1].curves[0].points[-1] == (10, None)


def test_a_long_run_is_drawn_by_means_over_equally_many_steps() -> None:
    values = np.random.default_rng(0).normal(size=10 * POINTS)
    data: list[dict[str, Any]] = [{"step": i + 1, "loss": value} for i, value in enumerate(values.tolist())]
    data += [{"step": i, "eval_loss": float(i), "note": "text"} for i in range(25, len(values) + 1, 25)]
    data[7]["loss"] = math.nan
    rows = thinned(data)
    (panel,) = panels(rows)
    loss, held_out = panel.curves
    assert [x for x, _ in loss.points] == list(range(10, 10 * POINTS + 1, 10))
    means = values.reshape(-1, 10).mean(axis=1)
    means[0] = np.delete(values[:10], 7).mean()
    np.testing.assert_allclose([y for _, y in loss.points], means)
    # evaluations are 25 steps apart: none is averaged with another
    assert [y for _, y in held_out.points] == list(range(25, 10 * POINTS + 1, 25))
    page = render_report(title="", rows=data)
    assert page == render_report(title="", rows=rows)
    assert page.count("Each point is the mean over 10 steps.") == 1
    assert thinned(data[:POINTS]) == data[:POINTS]


def test_no_text_of_a_run_is_in_a_picture_and_each_follows_dark_mode() -> None:
    import xml.etree.ElementTree as ET

    for panel in panels(hostile_report()["rows"]):
        svg = base64.b64decode(panel.image.removeprefix("data:image/svg+xml;base64,")).decode()
        assert "prefers-color-scheme: dark" in svg
        words = {element.text for _, element in ET.iterparse(io.StringIO(svg)) if element.tag.endswith("}text")}
        assert all(word == "step" or set(word) <= set("0123456789.−") for word in words)
