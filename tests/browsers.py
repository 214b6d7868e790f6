# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""A Chromium of the system, and what is looked for in the pages that it shows."""

import os
import shutil

import pytest


NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is found: set CHROMIUM to its path")

# Pictures without an alternative text, and text of less contrast with its ground than WCAG asks for: 4.5, large text 3
UNREADABLE = """() => {
  const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = c => .2126 * linear(c[0] / 255) + .7152 * linear(c[1] / 255) + .0722 * linear(c[2] / 255);
  const pen = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = colour => { pen.clearRect(0, 0, 1, 1); pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1);
                           return [...pen.getImageData(0, 0, 1, 1).data]; };
  const found = [];
  for (const one of document.querySelectorAll('body *')) {
    const style = getComputedStyle(one);
    const text = [...one.childNodes].filter(n => n.nodeType == 3).map(n => n.data.trim());
    if (one.tagName == 'IMG' && one.checkVisibility() && !one.alt) found.push('no alt: ' + one.src);
    if (!text.join('') || !one.checkVisibility() || style.opacity == 0 || one.closest('svg')) continue;
    let ground = one;
    while (ground && rgba(getComputedStyle(ground).backgroundColor)[3] < 255) ground = ground.parentElement;
    const onCanvas = one.closest('.empty.wrap');  // which is white, and no ancestor
    const back = light(ground && !onCanvas ? rgba(getComputedStyle(ground).backgroundColor) : [255, 255, 255]);
    const front = light(rgba(style.color)), size = parseFloat(style.fontSize);
    const contrast = (Math.max(front, back) + .05) / (Math.min(front, back) + .05);
    const large = size >= 24 || size >= 18.66 && style.fontWeight >= 700;
    if (contrast < (large ? 3 : 4.5)) found.push(contrast.toFixed(2) + ' ' + text.join(' ').slice(0, 60));
  }
  return found;
}"""
