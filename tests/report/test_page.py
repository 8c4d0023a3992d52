"""Parts of a page and its pictures: what is escaped, what is inside, pictures that are the same bytes each time."""

from __future__ import annotations

import base64

import numpy as np

from hdscale.report.page import figure, heading, link, number_cell, page, quiet, table
from hdscale.report.palette import COLOURS, style
from hdscale.report.pictures import Picture, fit_limits, legend, new_figure, plain_log_ticks, short


def picture() -> Picture:
    drawing, axes = new_figure()
    (line,) = axes.plot([1e6, 2e6], [2.0, 3.0])
    axes.set_xscale("log")
    plain_log_ticks(axes, y=False)
    legend(drawing, [line], ["a"])
    return Picture("size", "Size < 2", drawing, ["a & b"])


def test_a_page_holds_its_style_its_pictures_and_its_text():
    shown = picture()
    text = page("A & B", [quiet("<b>inner</b>"), figure(shown, shown.png()), heading("Runs")])
    assert "<title>A &amp; B</title>" in text and "<h1>A &amp; B</h1>" in text and "<style>" in text
    assert "<b>inner</b>" in text and "<h2>Size &lt; 2</h2>" in text and "<li>a &amp; b</li>" in text
    assert link("size.png", "size.png") in text
    assert f"base64,{base64.b64encode(shown.png()).decode()}" in text


def test_a_picture_is_the_same_bytes_each_time():
    assert picture().png() == picture().png()
    assert picture().png().startswith(b"\x89PNG")


def test_numbers_in_tables():
    assert number_cell(1234.5, "{:,.0f}") == '<td class="number">1,234</td>'
    assert number_cell(None, "{:.2f}") == number_cell(float("nan"), "{:.2f}") == '<td class="number"></td>'
    assert table(["<th>run</th>"], ["<td>one</td>"]).count("<tr>") == 2


def test_groups_beyond_the_palette_still_differ():
    count = 3 * len(COLOURS)
    assert len({style(index) for index in range(count)}) == count


def test_axes_show_readable_numbers():
    assert [short(value) for value in (1_200_000, 300_000, 2.5, 4e9)] == ["1.2M", "300k", "2.5", "4G"]
    _, axes = new_figure()
    axes.set_yscale("log")
    fit_limits(axes, [1.0, 10.0])
    low, high = axes.get_ylim()
    assert low < 1.0 < 10.0 < high and np.log10(high / low) < 1.5
