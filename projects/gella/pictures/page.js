"use strict";
// One set of listeners for all figures of a page, those that come later included. What is lit
// follows from three things, in this order: what is pinned, under the pointer, in focus.
(() => {
  if (document.gellaFigures) return; // the script may be on a page twice
  document.gellaFigures = true;
  const PART = ".gella [data-entity], .gella [data-noun]";
  let hovered = null;
  let focused = null;

  const partOf = (target) => (target instanceof Element ? target.closest(PART) : null);
  const figureOf = (part) => (part ? part.closest(".gella") : null);
  const numbersOf = (noun) => noun.dataset.entities.split(" ").filter(Boolean);

  function refresh(figure) {
    if (!figure) return;
    const own = (part) => (part && figure.contains(part) ? part : null);
    const part = figure.querySelector(".pinned") || own(hovered) || own(focused);
    const nouns = [...figure.querySelectorAll("[data-noun]")];
    let lit = [];
    if (part && "noun" in part.dataset) lit = numbersOf(part);
    else if (part) lit = [part.dataset.entity];
    for (const node of figure.querySelectorAll("[data-entity], [data-label]")) {
      node.classList.toggle("lit", lit.includes(node.dataset.entity || node.dataset.label));
    }
    for (const noun of nouns) {
      const named = part && "entity" in part.dataset && numbersOf(noun).includes(lit[0]);
      noun.classList.toggle("lit", noun === part || Boolean(named));
    }
    figure.classList.toggle("active", Boolean(part));
    const status = figure.querySelector(".status");
    if (status) status.textContent = part ? part.dataset.says : status.dataset.hint;
  }

  function pin(figure, part) {
    const before = figure.querySelector(".pinned");
    if (before) {
      before.classList.remove("pinned");
      if ("noun" in before.dataset) before.setAttribute("aria-pressed", "false");
    }
    if (part && part !== before) {
      part.classList.add("pinned");
      if ("noun" in part.dataset) part.setAttribute("aria-pressed", "true");
    }
    refresh(figure);
  }

  function hover(part) {
    if (part === hovered) return;
    const before = figureOf(hovered);
    hovered = part;
    refresh(before);
    if (figureOf(part) !== before) refresh(figureOf(part));
  }

  function focus(part) {
    const before = figureOf(focused);
    focused = part;
    refresh(before);
    if (figureOf(part) !== before) refresh(figureOf(part));
  }

  document.addEventListener("pointerover", (event) => hover(partOf(event.target)));
  document.documentElement.addEventListener("pointerleave", () => hover(null));
  document.addEventListener("focusin", (event) => {
    // A click focuses too, and would leave the noun lit when the pointer has gone.
    focus(event.target.matches(":focus-visible") ? partOf(event.target) : null);
  });
  document.addEventListener("focusout", () => focus(null));
  function act(figure, button) {
    if (button.dataset.act === "original") {
      button.setAttribute("aria-pressed", String(figure.classList.toggle("plain")));
      return;
    }
    const stage = figure.querySelector(".stage");
    const zoom = (Number(button.dataset.zoom) % 4) * 2 || 1; // 1, 2, 4, 1
    figure.classList.remove("zoom2", "zoom4");
    if (zoom > 1) figure.classList.add(`zoom${zoom}`);
    button.dataset.zoom = zoom;
    button.textContent = `Zoom: ${zoom}\u00d7`;
    stage.scrollTo((stage.scrollWidth - stage.clientWidth) / 2, (stage.scrollHeight - stage.clientHeight) / 2);
  }

  document.addEventListener("click", (event) => {
    const part = partOf(event.target);
    const button = event.target instanceof Element && event.target.closest(".gella [data-act]");
    if (button) act(figureOf(button), button);
    else if (part) pin(figureOf(part), part);
    else if (event.target instanceof Element && figureOf(event.target)) {
      pin(figureOf(event.target), null);
    }
  });
  document.addEventListener("keydown", (event) => {
    const part = partOf(event.target);
    if (event.key === "Escape") {
      document.querySelectorAll(".gella .pinned").forEach((node) => pin(figureOf(node), null));
    } else if (part && (event.key === "Enter" || event.key === " ")) {
      event.preventDefault(); // a space would scroll
      pin(figureOf(part), part);
    }
  });
})();
