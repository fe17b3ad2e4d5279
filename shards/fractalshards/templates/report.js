"use strict";
(() => {
  const FIRST = 24; // classes that are shown before one asks for more
  const filter = document.getElementById("filter");
  const status = document.getElementById("status");
  const more = document.getElementById("more");
  const cards = Array.from(document.querySelectorAll(".class"), (element) => ({
    element,
    index: Number(element.dataset.class),
    words: Array.from(element.querySelectorAll(".name, .id"), (word) => word.textContent.toLowerCase()),
  }));
  let all = cards.length <= FIRST;

  // "7", "0-9" and "7, 12" are class indices; anything else is part of a name
  const matcher = (query) => {
    const tests = query.split(",").map((part) => part.trim().toLowerCase()).filter(Boolean).map((part) => {
      const range = part.match(/^(\d+)(?:\s*-\s*(\d+))?$/);
      if (!range) return (card) => card.words.some((word) => word.includes(part));
      const low = Number(range[1]);
      const high = range[2] === undefined ? low : Number(range[2]);
      return (card) => card.index >= low && card.index <= high;
    });
    return (card) => tests.some((test) => test(card));
  };

  const show = () => {
    const query = filter.value.trim();
    const matches = query ? cards.filter(matcher(query)) : cards;
    const shown = new Set(query || all ? matches : matches.slice(0, FIRST));
    for (const card of cards) card.element.hidden = !shown.has(card);
    const count = (number) => number.toLocaleString("en");
    status.textContent = matches.length ? `${count(shown.size)} of ${count(cards.length)} classes` : "no such class here";
    more.hidden = Boolean(query) || all;
    more.textContent = `Show all ${count(cards.length)} classes`;
  };

  const fromAddress = () => {
    const found = location.hash.match(/^#class=(.*)$/);
    if (!found) return;
    try { filter.value = decodeURIComponent(found[1]); } catch { return; }
    show();
    document.getElementById("samples").scrollIntoView();
  };

  filter.addEventListener("input", () => {
    show();
    const query = filter.value.trim();
    const address = query ? `#class=${encodeURIComponent(query)}` : "#samples";
    try { history.replaceState(null, "", address); } catch { /* some browsers keep local files from it */ }
  });
  more.addEventListener("click", () => {
    const next = cards[FIRST].element;
    all = true;
    show();
    next.tabIndex = -1;
    next.focus({ preventScroll: true }); // the button is gone: the keyboard goes on where it stood
  });
  const boxes = document.getElementById("boxes");
  if (boxes) boxes.addEventListener("change", () => document.getElementById("classes").classList.toggle("boxed", boxes.checked));
  window.addEventListener("hashchange", fromAddress);

  // the clipboard is there on https and for local files only; a page on a plain http server selects and copies
  const copy = async (code) => {
    try {
      await navigator.clipboard.writeText(code.textContent);
      return true;
    } catch {
      getSelection().selectAllChildren(code);
      return document.execCommand("copy");
    }
  };
  for (const button of document.querySelectorAll(".copy")) {
    button.hidden = false;
    button.addEventListener("click", async () => {
      button.textContent = (await copy(button.previousElementSibling)) ? "Copied" : "Press Ctrl+C";
      setTimeout(() => { button.textContent = "Copy"; }, 2000);
    });
  }

  document.getElementById("controls").hidden = false;
  show();
  fromAddress();
})();
