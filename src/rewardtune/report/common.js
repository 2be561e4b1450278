"use strict";
// Shared by the report and the A/B sheet. Text reaches the page as textContent only.

function make(name, attributes, ...children) {
  const svg = ["svg", "g", "path", "line", "circle", "rect", "text"].includes(name);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key === "on") for (const [event, act] of Object.entries(value)) element.addEventListener(event, act);
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

// Storage may be forbidden (private windows, file:// in some browsers): the page works without.
function remember(store, key, value) {
  try { window[store].setItem(key, value); return true; } catch (error) { return false; }
}
function recall(store, key) {
  try { return window[store].getItem(key); } catch (error) { return null; }
}

const pageData = JSON.parse(document.getElementById("data").textContent);

(function theme() {
  const button = document.getElementById("theme");
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const saved = recall("localStorage", "rewardtune-theme");
  if (saved === "dark" || saved === "light") document.documentElement.dataset.theme = saved;
  const now = () => document.documentElement.dataset.theme || (system.matches ? "dark" : "light");
  const label = () => { button.textContent = now() === "dark" ? "Light colours" : "Dark colours"; };
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = now() === "dark" ? "light" : "dark";
    remember("localStorage", "rewardtune-theme", now());
    label();
  });
  system.addEventListener("change", label);
  button.hidden = false;
  label();
})();
