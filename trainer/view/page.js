"use strict";
// State lives in the address (#q=…&side=…&n=…), so that a view can be linked to and reloaded.
const examples = JSON.parse(document.getElementById("data").textContent);
const PAGE = 20;
const IN_LOSS = 1, CONTROL = 2;
const $ = (id) => document.getElementById(id);
const list = $("list"), field = $("q"), more = $("more"), tip = $("tip"), edges = $("edges");
const sides = [...document.querySelectorAll("input[name=side]")];
const state = { q: "", side: "all", n: PAGE };
let matches = [];

function element(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

for (const example of examples) {
  example.text = example.pieces.map((piece) => piece[1]).join("");
  example.lower = (example.name + "\n" + example.text).toLowerCase();
}

function tokens(example) {
  const box = element("div", "tokens");
  box.tabIndex = 0;
  box.dir = "auto";
  box.setAttribute("role", "group");
  box.setAttribute("aria-label", `Tokens of ${example.name}; arrow keys walk through them`);
  let at = 0, run = null, was = null;
  for (const [ids, text, flags] of example.pieces) {
    const inLoss = flags & IN_LOSS;
    if (inLoss !== was) {
      run = box.appendChild(element(inLoss ? "mark" : "span", inLoss ? "" : "p"));
      was = inLoss;
    }
    const span = run.appendChild(element("span", flags & CONTROL ? "t c" : "t"));
    span.dataset.at = at;
    span.dataset.ids = ids.join(" ");
    text.split("\n").forEach((line, i) => {
      if (i) {
        span.append(element("span", "nl"), "\n");
      }
      span.append(line);
    });
    at += ids.length;
  }
  return box;
}

function card(example) {
  const made = element("article", "row");
  const head = made.appendChild(element("header"));
  head.append(element("h3", "", example.name));
  head.append(element("span", example.held ? "chip held-out" : "chip", example.held ? "held out" : "training"));
  for (const why of example.why) head.append(element("span", "why", why));
  const size = `${example.tokens.toLocaleString("en")} tokens, ${example.loss_tokens.toLocaleString("en")} in the loss`;
  head.append(element("span", "size", size));
  made.append(tokens(example));
  return made;
}

function highlight() {
  if (!window.Highlight || !CSS.highlights) return;
  CSS.highlights.delete("hit");
  const wanted = state.q.toLowerCase();
  if (!wanted) return;
  const found = [];
  for (const box of list.querySelectorAll(".tokens")) {
    const whole = box.textContent.toLowerCase();
    // a letter whose small form is longer would shift every place after it
    if (whole.length !== box.textContent.length) continue;
    const walker = document.createTreeWalker(box, NodeFilter.SHOW_TEXT);
    let node = walker.nextNode(), before = 0;
    const place = (at) => {
      while (node && before + node.length < at) {
        before += node.length;
        node = walker.nextNode();
      }
      return [node, at - before];
    };
    for (let at = whole.indexOf(wanted); at >= 0; at = whole.indexOf(wanted, at + wanted.length)) {
      const range = new Range();
      range.setStart(...place(at));
      range.setEnd(...place(at + wanted.length));
      found.push(range);
    }
  }
  CSS.highlights.set("hit", new Highlight(...found));
}

function draw() {
  const wanted = state.q.toLowerCase();
  matches = examples.filter(
    (e) => (state.side === "all" || (state.side === "held-out") === e.held) && e.lower.includes(wanted),
  );
  list.replaceChildren(...matches.slice(0, state.n).map(card));
  if (!matches.length) list.append(element("p", "card", "No example here matches."));
  finish();
}

function finish() {
  const shown = Math.min(state.n, matches.length);
  $("count").textContent = `${shown} of ${matches.length}` + (matches.length < examples.length ? ` (${examples.length})` : "");
  const left = matches.length - shown;
  more.hidden = !left;
  more.textContent = `Show ${Math.min(PAGE, left)} more of ${left}`;
  highlight();
}

function remember() {
  const kept = new URLSearchParams();
  if (state.q) kept.set("q", state.q);
  if (state.side !== "all") kept.set("side", state.side);
  if (state.n !== PAGE) kept.set("n", state.n);
  try {
    history.replaceState(null, "", "#" + kept);
  } catch {
    // some viewers forbid it; the page works without
  }
}

function recall() {
  const kept = new URLSearchParams(location.hash.slice(1));
  state.q = kept.get("q") || "";
  state.side = sides.some((s) => s.value === kept.get("side")) ? kept.get("side") : "all";
  state.n = Math.max(PAGE, parseInt(kept.get("n"), 10) || PAGE);
  field.value = state.q;
  for (const side of sides) side.checked = side.value === state.side;
  draw();
}

function change(what) {
  Object.assign(state, { n: PAGE }, what);
  remember();
  draw();
}

function point(token, byKey) {
  for (const old of list.querySelectorAll(".t.on")) old.classList.remove("on");
  tip.hidden = !token;
  if (!token) return;
  if (byKey) token.classList.add("on");
  const ids = token.dataset.ids.split(" "), at = Number(token.dataset.at);
  const places = ids.length > 1 ? `places ${at}–${at + ids.length - 1}` : `place ${at}`;
  const mask = token.closest("mark") ? (at ? "in the loss" : "first, so nothing predicts it") : "prompt";
  const kind = token.classList.contains("c") ? ", control token" : "";
  tip.textContent = `${ids.length > 1 ? "ids" : "id"} ${ids.join(" ")} · ${places} · ${mask}${kind}`;
  const box = token.getClientRects()[0], size = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - size.width - 8))}px`;
  tip.style.top = `${box.top > size.height + 12 ? box.top - size.height - 6 : box.bottom + 6}px`;
}

function walk(event) {
  const box = event.target.closest?.(".tokens");
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!box || !step) return;
  event.preventDefault();
  const all = [...box.querySelectorAll(".t")];
  const next = all[Math.max(0, Math.min(all.length - 1, all.findIndex((t) => t.classList.contains("on")) + step))];
  if (!next) return;
  next.scrollIntoView({ block: "nearest" });
  point(next, true);
}

let wait = 0;
field.addEventListener("input", () => {
  clearTimeout(wait);
  wait = setTimeout(() => change({ q: field.value }), 120);
});
for (const side of sides) side.addEventListener("change", () => change({ side: side.value }));
edges.addEventListener("change", () => list.classList.toggle("edges", edges.checked));
more.addEventListener("click", () => {
  const from = state.n;
  state.n += PAGE;
  list.append(...matches.slice(from, state.n).map(card));
  list.children[from]?.querySelector(".tokens").focus();
  finish();
  remember();
});
list.addEventListener("pointerover", (event) => point(event.target.closest(".t")));
list.addEventListener("pointerleave", () => point(null));
list.addEventListener("focusout", () => point(null));
list.addEventListener("keydown", walk);
// the arrow keys themselves scroll: what they point at stays pointed at
addEventListener("scroll", () => point(list.querySelector(".t.on"), true), { passive: true, capture: true });
addEventListener("keydown", (event) => {
  if (event.key === "Escape") point(null);
  if (event.key === "/" && document.activeElement !== field) {
    event.preventDefault();
    field.focus();
  }
});
addEventListener("hashchange", () => location.hash === "#examples" || recall());
list.classList.add("edges");
recall();
