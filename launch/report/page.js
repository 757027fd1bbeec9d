"use strict";
// The one thing that needs a script: a click on a head of the ranking sorts it. Without it the page is complete.
const table = document.querySelector("table.ranked");
const body = table.tBodies[0];
const heads = [...table.tHead.rows[0].cells];

function order(column, falling) {
  const key = (row) => row.cells[column].dataset.value;
  const compare = (a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
    const [p, q] = [Number(x), Number(y)];
    const found = Number.isNaN(p) || Number.isNaN(q) ? x.localeCompare(y) : p - q;
    return falling ? -found : found;
  };
  body.append(...[...body.rows].sort(compare));
  heads.forEach((head, k) => {
    if (k === column) head.setAttribute("aria-sort", falling ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
  });
}

if (body.rows.length > 1) {
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.title = "Sort";
    button.addEventListener("click", () => order(column, head.getAttribute("aria-sort") === "ascending"));
    head.append(button);
  });
}
