"""Cleaning takes whole lines or private details, and never merges two lines."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quintet.data.clean import EMAIL, IP, KEY, edits_of, lines_of, scrubbed, without_license, without_noise_lines
from quintet.spec.quality import C4, Code, Quality

HEADERS = {
    "# Copyright 2020 Me\n# All rights reserved.\n\nimport x\n": "import x\n",
    "#!/bin/sh\n# Copyright 2020\n# more\necho\n": "#!/bin/sh\necho\n",
    "/*\n * Licensed under MIT.\n\n * more\n */\n\nint x;\n": "int x;\n",
    "// SPDX-License-Identifier: MIT\npackage x\n": "package x\n",
    '"""A module under the MIT license."""\nimport x\n': "import x\n",
    "<!-- licence: none -->\n<html>\n": "<html>\n",
    "# How to use it\nimport x\n": "# How to use it\nimport x\n",
    "import x\n# Copyright\n": "import x\n# Copyright\n",
    '"""Copyright, and it never ends\nimport x\n': '"""Copyright, and it never ends\nimport x\n',
}


@pytest.mark.parametrize("text", HEADERS)
def test_a_licence_header_is_taken_out_and_nothing_else(text: str) -> None:
    assert without_license(text) == HEADERS[text]


LINES = ["# Copyright", "# x", "/*", "*/", '"""', "", "import x", "a b c d.", "me@example.org", "10.0.0.1"]
ANY_TEXT = st.lists(st.one_of(st.sampled_from(LINES), st.text(max_size=9)), max_size=12).map("\n".join)


@given(ANY_TEXT)
def test_no_edit_ever_merges_lines(text: str) -> None:
    lines = lines_of(text)
    assert "".join(lines) == text
    for edit in (without_license, without_noise_lines):
        rest = iter(lines)
        assert all(line in rest for line in lines_of(edit(text))), edit.__name__  # kept lines, whole and in order
    assert scrubbed(text).count("\n") == text.count("\n")


def test_lines_that_are_no_prose_are_taken_out_as_c4_does() -> None:
    text = "A sentence of words.\nMenu\nHome About Contact\nPlease enable Javascript now.\n\n"
    text += "This site uses cookies today.\nIt goes on ...\nThe end!\n"
    assert without_noise_lines(text) == "A sentence of words.\n\n"
    assert without_noise_lines("So it was there!\n") == "So it was there!\n"


def test_private_details_become_placeholders_and_private_addresses_stay() -> None:
    key = "AKIA" + "A" * 16
    text = f"mail jane.doe+x@mail.example.org from 8.8.8.8 or 192.168.0.1, version 999.1.1.1, {key}, ghp_{'a' * 36}."
    assert scrubbed(text) == f"mail {EMAIL} from {IP} or 192.168.0.1, version 999.1.1.1, {KEY}, {KEY}."
    secret = "-----BEGIN PRIVATE KEY-----\nabc\ndef\n-----END PRIVATE KEY-----"
    assert scrubbed(secret) == f"-----BEGIN PRIVATE KEY-----\n{KEY}\n\n-----END PRIVATE KEY-----"
    assert scrubbed("x@y and @decorator") == "x@y and @decorator"


def test_edits_follow_the_recipe_and_the_domain() -> None:
    quality = Quality(files=Code(strip_license=True), c4=C4(clean_lines=True), scrub=True)
    assert edits_of(Quality(), "code") == ()
    assert edits_of(quality, "code") == (without_license, scrubbed)
    assert edits_of(quality, "prose") == (without_noise_lines, scrubbed)
