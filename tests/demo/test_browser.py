"""Claims about the pages of `llm-jepa demo` in a real browser: load, upload, ask, see the answer; all of it offline."""

from __future__ import annotations

import socket

import pytest

pytest.importorskip("gradio")
pytest.importorskip("av")

from llm_jepa.demo import lm, vl
from llm_jepa.demo.page import POLICY, serving
from tests.chromium import browser, requested_hosts, until
from tests.conftest import tiny_model
from tests.vl.watch.rooms import build, video, with_texts

EVIL = "<img src=x onerror='window.pwned=1'> ${window.pwned=2} {{window.pwned}}"


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(autouse=True)
def uploads(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "0")


def fill(page, element, text):
    page.find_element("css selector", f"#{element} textarea, #{element} input[type=text]").send_keys(text)


def click(page, element):
    page.find_element("css selector", f"#{element}").click()


def text_of(element, word):
    return f"document.querySelector('#{element}')?.innerText.includes({word!r})"


def test_upload_a_film_watch_it_and_ask(port, tmp_path):
    model = with_texts(*build(), texts=(EVIL, "a green room"))
    film = video(tmp_path / "rooms.mp4", 24)
    with (
        serving(vl.build_page(model, "tiny"), host="127.0.0.1", port=port) as address,
        browser() as page,
    ):
        page.get(address)
        until(page, "document.querySelector('#film input[type=file]')")
        page.find_element("css selector", "#film input[type=file]").send_keys(str(film))
        until(page, "document.querySelector('#film video')?.src")
        click(page, "watch")
        until(page, text_of("story", "of film\\n") + " || " + text_of("story", "00:23"))
        until(page, "document.querySelectorAll('#story .captions li').length == 4")
        assert page.execute_script("return document.querySelectorAll('#story line.cut').length") == 3
        fill(page, "question", "which room?")
        fill(page, "candidates", f"a red room\n{EVIL}")
        click(page, "ask")
        until(page, "document.querySelector('#reply .bars .first')")
        assert "not probabilities" in page.find_element("css selector", "#reply").text
        assert EVIL in page.find_element("css selector", "#reply").text
        assert page.execute_script("return window.pwned") is None
        assert requested_hosts(page) == {"127.0.0.1"}


def test_compare_two_models_on_a_prompt_in_two_wordings(port, tokenizer):
    models = [lm.Model(name, tiny_model(tokenizer), tokenizer) for name in ("sft", "jepa")]
    with serving(lm.build_page(models), host="127.0.0.1", port=port) as address, browser() as page:
        page.get(address)
        until(page, "document.querySelector('#prompts textarea')")
        fill(page, "prompts", "lines with a vowel\nlines that contain a vowel")
        click(page, "compare")
        until(page, "document.querySelectorAll('#result circle').length == 4")
        assert "2 of 2\nprompts get the same answer from both" in page.find_element("css selector", "#result").text
        assert requested_hosts(page) == {"127.0.0.1"}


def test_a_page_forbids_everything_from_elsewhere(port, tokenizer):
    import httpx

    page = lm.build_page([lm.Model("tiny", tiny_model(tokenizer), tokenizer)])
    with serving(page, host="127.0.0.1", port=port) as address:
        answer = httpx.get(address, trust_env=False)
    assert answer.status_code == 200 and answer.headers["content-security-policy"] == POLICY
    assert "googleapis" not in answer.text and "gstatic" not in answer.text
