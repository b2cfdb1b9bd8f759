"""Take the pictures of docs/serve.md: the page on a desktop and on a phone, with the micro model.

    python scripts/page_pictures.py docs/images

Needs Chromium and what the tests need; the browser and the server are theirs.
"""

import base64
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from browser import browsing  # noqa: E402
from serving import running  # noqa: E402
from test_serve_page import ASK, DONE, DROP  # noqa: E402

from apollo.world.make import make_world  # noqa: E402

QUESTIONS = ("List the events in order.", "List the events with their times.", "What happens last?")
SIZES = {"desktop": (1280, 800), "phone": (390, 844)}


def main() -> None:
    """Talk to a video of the test split at each size of the window."""
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, running() as server:
        make_world(Path(folder) / "world", 1, seed=3, split="test", workers=1)
        (video,) = (Path(folder) / "world" / "videos").iterdir()
        data = json.dumps(base64.b64encode(video.read_bytes()).decode())
        for name, (width, height) in SIZES.items():
            with browsing(Path(folder) / name) as browser:
                browser.show(server.url, width, height)
                browser.wait_for("document.getElementById('model').textContent !== ''")
                browser.run(DROP % data)
                browser.wait_for("!document.getElementById('question').disabled")
                for number, question in enumerate(QUESTIONS, start=1):
                    browser.run(ASK % json.dumps(question))
                    browser.wait_for(
                        f"document.querySelectorAll('#turns li').length === {2 * number}"
                    )
                    browser.wait_for(DONE)
                    print(browser.run("document.querySelector('#turns li:last-child').innerText"))
                browser.run("document.querySelectorAll('#line .clip')[2].click()")
                browser.wait_for("!video.seeking")
                browser.screenshot(out / f"page_{name}.png")


if __name__ == "__main__":
    main()
