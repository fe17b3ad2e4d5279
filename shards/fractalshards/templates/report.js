"use strict";
// The filter takes class indices ("7", "0-9") and parts of names, separated by commas. ?class=7 presets it.
const filter = document.getElementById("filter");
const cards = [...document.querySelectorAll(".class")];
const names = cards.map((card) => card.querySelector("h3 b").textContent.toLowerCase());

function applyFilter() {
  const parts = filter.value.toLowerCase().split(",").map((part) => part.trim()).filter(Boolean);
  let count = 0;
  cards.forEach((card, position) => {
    const matches = (part) => {
      const range = part.match(/^(\d+)(?:\s*-\s*(\d+))?$/);
      if (!range) return names[position].includes(part);
      return card.dataset.class >= Number(range[1]) && card.dataset.class <= Number(range[2] ?? range[1]);
    };
    card.hidden = parts.length > 0 && !parts.some(matches);
    count += !card.hidden;
  });
  document.querySelector("output").textContent = parts.length ? `${count} of ${cards.length} classes` : "";
  document.querySelectorAll("details.more").forEach((more) => { more.open ||= parts.length > 0; });
}

filter.addEventListener("input", applyFilter);
filter.value = new URLSearchParams(location.search).get("class") ?? "";
applyFilter();

for (const button of document.querySelectorAll("button")) {
  button.addEventListener("click", () => {
    getSelection().selectAllChildren(button.previousElementSibling);
    if (document.execCommand("copy")) button.textContent = "Copied"; // works on plain http, too
  });
}
document.body.classList.add("scripted");
