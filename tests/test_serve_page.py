"""The page in a real browser: drop a video, ask, see the answer stream, click a time."""

import base64
import json

import pytest
from browser import CHROMIUM, browsing
from serving import running

from apollo.serve.api import Settings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]
DROP = """(() => {
  const bytes = Uint8Array.from(atob(%s), (c) => c.charCodeAt(0));
  const data = new DataTransfer();
  data.items.add(new File([bytes], "a.mp4", { type: "video/mp4" }));
  document.getElementById("drop").dispatchEvent(
    new DragEvent("drop", { bubbles: true, cancelable: true, dataTransfer: data }));
})()"""
ASK = """(() => {
  document.getElementById("question").value = %s;
  document.getElementById("ask").requestSubmit();
})()"""
WORDS = "At 00:04 the <b>ball</b> moves, at 7.5 s it stops; nothing is at 55:55."
WATCH = """(() => {
  window.lengths = new Set();
  const look = () => lengths.add(document.getElementById("turns").textContent.length);
  new MutationObserver(look).observe(
    document.getElementById("turns"), { childList: true, subtree: true, characterData: true });
})()"""
LAST = "document.querySelector('#turns li:last-child')"
DONE = f"{LAST}.classList.contains('assistant') && !!{LAST}.querySelector('.tools')"


@pytest.mark.parametrize(("width", "height"), [(1280, 860), (390, 844)])
def test_a_conversation_on_the_page(tmp_path, plain_video, width, height, monkeypatch):
    # The model's words are its own; these are what a page must cope with.
    def two_letters(self, tokenizer, ids, is_last):
        return WORDS[2 * len(ids) - 2 : 2 * len(ids)], False

    monkeypatch.setattr("apollo.serve.jobs.Text.add", two_letters)
    settings = Settings("micro", "sesame", longest_answer=-(-len(WORDS) // 2))
    data = base64.b64encode(plain_video.path.read_bytes()).decode()
    with (
        running(settings) as server,
        browsing(tmp_path / "profile") as browser,
    ):
        server.engine._ends = set()
        browser.show(server.url, width, height)
        browser.wait_for("!document.getElementById('key').hidden")
        browser.run("document.getElementById('key-text').value = 'sesame'")
        browser.run("document.getElementById('key').requestSubmit()")
        browser.wait_for("document.getElementById('model').textContent === 'micro'")
        browser.run(DROP % json.dumps(data))
        browser.wait_for("!document.getElementById('question').disabled")
        assert browser.run("document.querySelectorAll('#line .clip').length") == 6
        assert browser.run("document.querySelectorAll('#frames img').length") == 24
        browser.run(WATCH)
        for number, question in enumerate(("What happens?", "And then?"), start=1):
            browser.run(ASK % json.dumps(question))
            browser.wait_for(f"document.querySelectorAll('#turns li').length === {2 * number}")
            browser.wait_for(DONE)
            assert browser.run(f"{LAST}.children[1].textContent") == WORDS
        assert browser.run("lengths.size") > 5  # the words came one after another
        assert browser.run(f"{LAST}.querySelectorAll('b').length") == 0  # text, never markup
        times = "[...document.querySelectorAll('#turns li:last-child .time')]"
        assert browser.run(f"{times}.map((t) => t.textContent)") == ["00:04", "7.5 s"]
        for index, expected_s in enumerate((4, 7.5)):
            browser.run(f"{times}[{index}].click()")
            browser.wait_for(f"Math.abs(video.currentTime - {expected_s}) < 0.1")
        browser.run("document.querySelectorAll('#line .clip')[5].click()")
        browser.wait_for("Math.abs(video.currentTime - 10) < 0.1")
        browser.run("document.querySelector('.retry').click()")
        browser.wait_for(DONE)
        assert browser.run("messages.length") == 4
        assert browser.run("document.documentElement.scrollWidth") <= width
        assert server.server.store.num_loaded == 1
