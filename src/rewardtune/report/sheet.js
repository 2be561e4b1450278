// Pairs one after the other; each vote is stored at once, and the file is made when the rater asks for it.
const place = (id) => document.getElementById(id);
const pairs = pageData.pairs;
let rater = "", votes = [], since = 0;
const shelf = () => `rewardtune-sheet ${pageData.sheet} ${rater}`;

function known(stored) {
  try {
    const found = JSON.parse(stored || "[]");
    return Array.isArray(found) && found.length <= pairs.length && found.every((vote, i) => vote.pair === pairs[i].pair) ? found : [];
  } catch (error) { return []; }
}

function keep() {
  const kept = remember("localStorage", shelf(), JSON.stringify(votes)) && remember("localStorage", `rewardtune-sheet ${pageData.sheet}`, rater);
  place("lost").hidden = kept;
}

function show() {
  const now = votes.length, done = now >= pairs.length;
  place("start").hidden = true;
  place("vote").hidden = done;
  place("end").hidden = !done;
  if (done) return place("end-title").focus();
  const pair = pairs[now];
  place("bar").value = now;
  place("place").textContent = `${rater}, pair ${now + 1} of ${pairs.length}`;
  place("ask").textContent = pair.prompt || pageData.question;
  place("left-image").src = pair.left;
  place("right-image").src = pair.right;
  place("undo").disabled = now === 0;
  since = Date.now();
}

function choose(choice) {
  if (place("vote").hidden) return;
  votes.push({ pair: pairs[votes.length].pair, choice, seconds: Math.round((Date.now() - since) / 100) / 10 });
  keep();
  show();
}

function undo() {
  if (!votes.length) return;
  votes.pop();
  keep();
  show();
}

function save() {
  const facts = { kind: "sheet-votes", sheet: pageData.sheet, rater, time: new Date().toISOString(), votes };
  const address = URL.createObjectURL(new Blob([JSON.stringify(facts, null, 1)], { type: "application/json" }));
  const name = `votes-${pageData.sheet}-${rater.replace(/[^\p{L}\p{N}-]+/gu, "_")}.json`;
  const link = make("a", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  window.setTimeout(() => URL.revokeObjectURL(address), 10000);
}

place("who").addEventListener("submit", (event) => {
  event.preventDefault();
  rater = place("rater").value.trim();
  if (!rater) return;
  votes = known(recall("localStorage", shelf()));
  keep();
  show();
});
place("rater").value = recall("localStorage", `rewardtune-sheet ${pageData.sheet}`) || "";
for (const side of ["left", "right", "tie"]) place(side).addEventListener("click", () => choose(side));
for (const id of ["undo", "again"]) place(id).addEventListener("click", undo);
for (const button of document.querySelectorAll(".save")) button.addEventListener("click", save);
document.addEventListener("keydown", (event) => {
  if (!place("start").hidden || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  const choice = { ArrowLeft: "left", ArrowRight: "right", ArrowDown: "tie", t: "tie", T: "tie" }[event.key];
  if (!choice && !["Backspace", "u", "U"].includes(event.key)) return;
  event.preventDefault();
  if (choice) choose(choice); else undo();
});
