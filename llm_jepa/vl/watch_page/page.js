"use strict";
const all = (selector) => [...document.querySelectorAll(selector)];
const one = (selector) => document.querySelector(selector);
const lane = one(".lane"), view = one(".scroll"), zoom = one("#zoom"), cursor = one(".cursor"), now = one(".now");
const start = +lane.dataset.start, seconds = +lane.dataset.seconds;
const pictures = all(".strip img"), blocks = all(".block"), items = all(".captions li");
const film = one("video");
let scale = 1;  // pixels a second
const fit = () => view.clientWidth / seconds;
const most = () => Math.max(160, 4 * fit());
const pad = (number) => String(number).padStart(2, "0");
function clock(t, digits) {
  const tenths = Math.round(t * 10), s = Math.floor(tenths / 10) % 60, m = Math.floor(tenths / 600);
  const hours = m >= 60 ? Math.floor(m / 60) + ":" : "";
  return hours + pad(m % 60) + ":" + pad(s) + (digits ? "." + tenths % 10 : "");
}
function ticks() {
  const every = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600, 7200].find((s) => s * scale >= 72) || 14400;
  const marks = [];
  for (let t = Math.ceil(start / every) * every; t <= start + seconds; t += every) {
    const mark = document.createElement("span");
    mark.textContent = clock(t, false);
    mark.style.left = (t - start) * scale + "px";
    if ((start + seconds - t) * scale > 40) marks.push(mark);
  }
  one(".ticks").replaceChildren(...marks);
}
function show(wanted) {  // keeps the moment in the middle where it is
  const middle = (view.scrollLeft + view.clientWidth / 2) / scale;
  scale = Math.min(Math.max(wanted, fit()), most());
  lane.style.setProperty("--px", scale);
  zoom.value = 100 * Math.log(scale / fit()) / Math.log(most() / fit());
  let until = 0;
  for (const picture of pictures) {  // whole ones, each at its time, none over another
    const x = (picture.dataset.t - start) * scale;
    picture.hidden = x < until - 0.5;
    if (picture.hidden) continue;
    picture.style.left = x + "px";
    until = x + 88 * picture.naturalWidth / picture.naturalHeight;
  }
  one(".curve").classList.toggle("dense", scale * seconds < 5 * blocks.length);
  for (const block of blocks) {
    const width = (block.dataset.end - block.dataset.start) * scale;
    block.classList.toggle("thin", width < 56);
    block.classList.toggle("bare", width < 15);
  }
  ticks();
  view.scrollLeft = middle * scale - view.clientWidth / 2;
  moved();
}
function moved() {
  const frame = one(".view").style, whole = lane.offsetWidth;
  frame.left = 100 * view.scrollLeft / whole + "%";
  frame.width = 100 * view.clientWidth / whole + "%";
}
function light(i, t) {
  for (const list of [blocks, items]) list.forEach((node) => node.classList.toggle("on", +node.dataset.i === i));
  now.hidden = i < 0;
  if (i < 0) return;
  const block = blocks[i], moment = t === undefined ? (+block.dataset.start + +block.dataset.end) / 2 : t;
  let near = null;
  for (const picture of pictures) if (!near || +picture.dataset.t <= moment) near = picture;
  if (near) now.querySelector("img").src = near.src;
  const text = now.querySelector("p"), about = document.createElement("small");
  const score = items[i].dataset.score, weak = items[i].classList.contains("weak") ? " (weak)" : "";
  about.textContent = items[i].querySelector(".when").textContent + (score ? " \u00b7 score " + score + weak : "");
  text.replaceChildren(block.textContent, about);
}
const sceneAt = (t) => blocks.findIndex((block) => +block.dataset.start <= t && t < +block.dataset.end);
function mark(t) {
  cursor.hidden = false;
  cursor.style.left = (t - start) * scale + "px";
  one("#time").textContent = clock(t, true);
}
function seek(t) {  // times of captions are those of a player
  if (film && !film.hidden) film.currentTime = t;
}
function go(i) {
  const begin = +blocks[i].dataset.start, middle = (begin + +blocks[i].dataset.end) / 2 - start;
  view.scrollTo({ left: middle * scale - view.clientWidth / 2, behavior: "smooth" });
  seek(begin);
  mark(begin);
  light(i);
}
const timeAt = (event) => start + (event.clientX - lane.getBoundingClientRect().left) / scale;
lane.addEventListener("mousemove", (event) => {
  const t = timeAt(event);
  mark(t);
  light(sceneAt(t), t);
});
lane.addEventListener("mouseleave", () => {
  cursor.hidden = true;
  if (film && !film.hidden) follow();
});
lane.addEventListener("click", (event) => seek(event.detail ? timeAt(event) : +event.target.dataset.start));
function reveal(i) {  // inside of the list, without moving the page
  const list = one(".captions"), item = items[i];
  const top = item.offsetTop - list.offsetTop;
  if (top < list.scrollTop) list.scrollTop = top;
  else if (top + item.offsetHeight > list.scrollTop + list.clientHeight) {
    list.scrollTop = top + item.offsetHeight - list.clientHeight;
  }
}
function follow() {
  const t = film.currentTime, i = sceneAt(t);
  mark(t);
  if (i < 0) return;
  light(i, t);
  reveal(i);
}
if (film) {
  for (const event of ["timeupdate", "seeked"]) film.addEventListener(event, follow);
  film.addEventListener("error", () => {
    film.hidden = true;
    one(".nofilm").hidden = false;
  });
}
blocks.forEach((block, i) => {
  block.addEventListener("focus", () => light(i));
  block.addEventListener("click", () => {
    light(i);
    reveal(i);
  });
});
items.forEach((item, i) => {
  item.addEventListener("click", () => go(i));
  item.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    go(i);
  });
});
view.addEventListener("scroll", moved);
one(".overview").addEventListener("click", (event) => {
  const box = event.currentTarget.getBoundingClientRect();
  view.scrollLeft = (event.clientX - box.left) / box.width * lane.offsetWidth - view.clientWidth / 2;
});
zoom.addEventListener("input", () => show(fit() * (most() / fit()) ** (zoom.value / 100)));
one("#fit").addEventListener("click", () => show(0));
addEventListener("resize", () => show(scale));
addEventListener("load", () => {  // pictures have no width before
  show(+lane.dataset.scale);
  view.scrollLeft = 0;
  light(blocks.length ? 0 : -1);
});
