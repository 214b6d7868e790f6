# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Takes the screen six times in a person's first minutes, from the clone to a painted map; each has its clock.

    apt-get install xvfb xterm chromium
    python docs/first_minutes.py --repository . --output_dir docs    # in an environment with the extra browser

What is typed and clicked is real: a terminal and a browser on a screen of their own, a home without anything in it.
"""

import argparse
import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from PIL import ImageDraw, ImageFont, ImageGrab
from playwright.sync_api import sync_playwright


DISPLAY, SIZE = ":77", (1180, 880)  # pixels
PROMPT = "'\\[\\e[1;34m\\]\\w $\\[\\e[0m\\] '"


class Screen:
    """A screen with a terminal, whose keys are typed by `type`."""

    def __init__(self, home: Path, output_dir: Path):
        self.home, self.output_dir, self.number = home, output_dir, 0
        (home / ".bashrc").write_text(f"PS1={PROMPT}\nstty columns 98 rows 40\n")
        os.mkfifo(home / ".keys")
        screen = ["Xvfb", DISPLAY, "-screen", "0", f"{SIZE[0]}x{SIZE[1]}x24"]
        terminal = ["xterm", "-fa", "DejaVu Sans Mono", "-fs", "14", "-geometry", "98x40+0+0"]
        shell = "exec script -qfc 'bash -i' .log < .keys"
        self.processes = [subprocess.Popen(screen, stderr=subprocess.DEVNULL)]
        time.sleep(2)
        environment = os.environ | {"DISPLAY": DISPLAY, "HOME": str(home)}
        self.processes.append(subprocess.Popen([*terminal, "-e", "bash", "-c", shell], env=environment, cwd=home))
        self.keys = (home / ".keys").open("w")
        self.start = time.perf_counter()
        time.sleep(1)

    def type(self, command: str) -> None:
        self.keys.write(command + "\n")
        self.keys.flush()

    def wait(self, pattern: str) -> str:
        """What the terminal shows, once it has shown this."""
        log, end = self.home / ".log", time.monotonic() + 300
        while not (found := re.search(pattern, shown := log.read_text(errors="replace"))):
            if time.monotonic() > end:
                raise TimeoutError(f"the terminal does not show {pattern}, but:\n{shown}")
            time.sleep(0.05)
        return found[0]

    def take(self) -> None:
        """The screen as it is, with minutes and seconds since the start."""
        time.sleep(0.5)
        self.number += 1
        picture = ImageGrab.grab(xdisplay=DISPLAY).convert("RGB")
        minutes, seconds = divmod(round(time.perf_counter() - self.start), 60)
        pen, corner = ImageDraw.Draw(picture), (SIZE[0] - 120, SIZE[1] - 56)
        pen.rectangle([corner, SIZE], fill="#3f51b5")
        pen.text(
            (corner[0] + 60, corner[1] + 28), f"{minutes}:{seconds:02}", "white", ImageFont.load_default(30), "mm"
        )
        picture.save(self.output_dir / f"first-{self.number}.jpg", quality=80)

    def close(self) -> None:
        self.type("\x03")  # what still runs
        self.type("exit")
        time.sleep(2)
        for process in reversed(self.processes):
            process.terminate()


def main(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        subprocess.run(["git", "clone", "--quiet", "--bare", args.repository, home / "diffusers-d2it.git"], check=True)
        screen = Screen(home, args.output_dir)
        try:
            walk(screen, home / "diffusers-d2it")
        finally:
            screen.close()


def walk(screen: Screen, clone: Path) -> None:
    """What a person does who reads README's second section."""
    screen.type("git clone diffusers-d2it.git && cd diffusers-d2it")
    screen.wait(r"/diffusers-d2it \$")
    screen.take()
    screen.type("make demo")
    screen.wait("1[0-9] of 20 steps")
    screen.take()
    screen.wait("next: make page")
    with sync_playwright() as playwright:
        chromium = {
            "executable_path": shutil.which("chromium"),
            "headless": False,
            "env": os.environ | {"DISPLAY": DISPLAY},
        }
        window = [f"--window-size={SIZE[0]},{SIZE[1]}", "--window-position=0,0", "--kiosk", "--no-sandbox"]
        browser = playwright.chromium.launch_persistent_context(
            str(clone.parent / "profile"), **chromium, args=window, no_viewport=True
        )
        page = browser.pages[0]
        page.goto(f"file://{clone}/demo.png")
        screen.take()
        screen.type("make page")
        page.goto(screen.wait(r"http://127\.0\.0\.1:\d+"))
        page.get_by_text(" ms").first.wait_for()
        screen.take()
        page.get_by_role("tab", name="Paint").click()
        page.get_by_text("seed 3: paint").wait_for()
        page.wait_for_timeout(1000)
        page.evaluate("scrollTo(0, 400)")
        box = page.locator("canvas:visible").first.bounding_box()
        for row in (0.3, 0.45, 0.6):
            page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + row * box["height"])
            page.mouse.down()
            page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + row * box["height"], steps=20)
            page.mouse.up()
        screen.take()
        page.get_by_role("button", name="Redraw").click()
        page.get_by_text("ms").last.wait_for()
        page.wait_for_timeout(1000)
        page.evaluate("scrollTo(0, 400)")
        screen.take()


if __name__ == "__main__":
    PARSER = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    PARSER.add_argument("--repository", default=".", help="what is cloned")
    PARSER.add_argument("--output_dir", type=Path, default=Path("docs"), help="where first-1.jpg to first-6.jpg go")
    main(PARSER.parse_args())
