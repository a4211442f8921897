"use strict";

// Every text of a run enters the page through textContent, never as markup.
function make(tag, className, text, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text != null) element.textContent = text;
  element.append(...children);
  return element;
}

const TAG = /(<\/?(?:switch|subgoal|action)>)/;
const LEVELS = ["switch", "subgoal", "action"];
const number = (value) => (value < 0 ? "−" : "") + Math.abs(value).toFixed(2);
const signed = (value) => (value < 0 ? "" : "+") + number(value);

function colour(element, advantage, scale) {
  if (advantage == null || !scale) {
    element.classList.add("none");
    return element;
  }
  const strength = Math.round(8 + 57 * Math.min(1, Math.abs(advantage) / scale));
  element.style.background = `color-mix(in srgb, var(${advantage < 0 ? "--bad" : "--good"}) ${strength}%, transparent)`;
  return element;
}

function described(turn, level) {
  const lines = [level];
  if (turn.advantage[level] != null) lines.push(`advantage ${signed(turn.advantage[level])}`);
  if (turn.value[level] != null) lines.push(`value ${number(turn.value[level])}`);
  return lines.join("\n");
}

function drawReply(turn, scale) {
  const reply = make("div", "reply");
  for (const [text, level] of turn.blocks) {
    if (!level) {
      reply.append(make("span", "", text));
      continue;
    }
    const block = colour(make("span", "block"), turn.advantage[level], scale);
    for (const part of text.split(TAG)) block.append(TAG.test(part) ? make("span", "tag", part) : part);
    block.dataset.tip = described(turn, level);
    if (turn.advantage[level] != null) block.append(make("sup", "", signed(turn.advantage[level])));
    reply.append(block);
  }
  return reply;
}

function drawTurn(turn, scale) {
  const element = make("div", "turn", null, make("span", "number", turn.number));
  element.id = `turn-${turn.number}`;
  const observation = turn.observation.trim();
  const first = observation.split("\n", 1)[0];
  if (first === observation && observation.length < 110) {
    element.append(make("p", "seen", first));
  } else {
    element.append(make("details", "", null, make("summary", "", first), make("p", "", observation)));
  }
  element.append(drawReply(turn, scale));
  const meta = make("div", "meta");
  if (turn.reward) meta.append(make("span", turn.reward < 0 ? "reward bad" : "reward", `reward ${signed(turn.reward)}`));
  if (!turn.valid) meta.append(make("span", "invalid", "invalid format"));
  for (const level of LEVELS) {
    if (turn.value[level] != null) meta.append(make("span", "", `V ${level} ${number(turn.value[level])}`));
  }
  if (meta.childNodes.length) element.append(meta);
  return element;
}

function segments(turns) {
  const groups = [];
  turns.forEach((turn, index) => {
    if (turn.switch || !groups.length) groups.push([]);
    groups.at(-1).push(index);
  });
  return groups;
}

// The whole episode in one strip: a column per turn, a row per level, a gap before each new segment.
function drawRibbon(episode, groups, scale) {
  const strip = make("div", "strip");
  for (const group of groups) {
    const piece = make("div", "piece");
    piece.style.flexGrow = group.length;
    for (const index of group) {
      const turn = episode.turns[index];
      const column = make("a");
      column.href = `#turn-${turn.number}`;
      for (const level of LEVELS) {
        const cell = colour(make("b"), turn.advantage[level], scale);
        cell.dataset.tip = `turn ${turn.number} · ${described(turn, level)}`;
        column.append(cell);
      }
      column.append(make("span", "", turn.number));
      piece.append(column);
    }
    strip.append(piece);
  }
  const names = make("div", "names", null, ...LEVELS.map((level) => make("span", "", level)));
  return make("div", "ribbon", null, names, strip);
}

function drawEpisode(episode, scale) {
  const groups = segments(episode.turns);
  const total = episode.turns.reduce((sum, turn) => sum + (turn.reward ?? 0), 0);
  const ending = episode.won ? "won" : episode.truncated ? "stopped at the turn limit" : "lost";
  const outcome = make("p", "outcome", episode.task || "no task text");
  const counts = `${episode.turns.length} turns in ${groups.length} segments, reward ${number(total)}`;
  outcome.append(make("small", episode.won ? "won" : "lost", ending), make("small", "", counts));

  const body = make("div", "", null, outcome, drawRibbon(episode, groups, scale));
  groups.forEach((group, index) => {
    const subgoal = episode.turns[group[0]].subgoal || "no subgoal";
    const [first, last] = [group[0], group.at(-1)].map((turn) => episode.turns[turn].number);
    const range = first < last ? `turns ${first} to ${last}` : `turn ${first}`;
    const heading = make("h3", "", subgoal, make("small", "", `segment ${index + 1} · ${range}`));
    const turns = group.map((turn) => drawTurn(episode.turns[turn], scale));
    body.append(make("div", "segment", null, heading, ...turns));
  });
  return body;
}

function drawViewer(root, entries) {
  if (!entries.length) {
    root.append(make("p", "empty", "No episode has been recorded yet."));
    return;
  }
  const steps = make("select");
  steps.setAttribute("aria-label", "step");
  entries.forEach((entry, index) => {
    const stage = entry.stage === "eval" ? "evaluation" : "training";
    const option = make("option", "", `Update ${entry.step}, ${stage}`);
    option.value = index;
    steps.append(option);
  });
  const list = make("nav", "list");
  const legend = make("div", "scale");
  const stage = make("div");
  root.append(make("div", "controls", null, steps, legend), make("div", "viewer", null, list, stage));

  function choose(entry, index) {
    [...list.children].forEach((button, other) => button.setAttribute("aria-current", other === index));
    stage.replaceChildren(drawEpisode(entry.episodes[index], entry.scale));
  }

  function open(entry) {
    legend.replaceChildren(
      ...(entry.scale
        ? [make("span", "", `advantage −${entry.scale.toFixed(1)}`), make("i"), make("span", "", `+${entry.scale.toFixed(1)}`)]
        : [make("span", "", "evaluation episodes carry no advantages")]),
    );
    list.replaceChildren(
      ...entry.episodes.map((episode, index) => {
        const button = make("button", episode.won ? "won" : "", episode.task || "no task text");
        button.append(make("small", "", `${episode.type} · ${episode.turns.length} turns`));
        button.addEventListener("click", () => choose(entry, index));
        return button;
      }),
    );
    choose(entry, 0);
  }

  steps.addEventListener("change", () => open(entries[steps.value]));
  const trained = entries.map((entry) => entry.scale != null);
  steps.value = Math.max(0, trained.lastIndexOf(true));
  open(entries[steps.value]);
}

// Hints follow the pointer: over a block its numbers, over a chart the values of the nearest step.
const tip = document.getElementById("tip");

function showTip(text, event) {
  tip.textContent = text;
  tip.hidden = false;
  const left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
  const top = event.clientY + 18 + tip.offsetHeight > innerHeight ? event.clientY - tip.offsetHeight - 12 : event.clientY + 18;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${top}px`;
}

for (const chart of document.querySelectorAll(".chart")) {
  const { x, text } = JSON.parse(chart.dataset.hover);
  const svg = chart.querySelector("svg");
  const cursor = chart.querySelector(".cursor");
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    let nearest = 0;
    x.forEach((value, index) => {
      if (Math.abs(value - at) < Math.abs(x[nearest] - at)) nearest = index;
    });
    cursor.setAttribute("x1", x[nearest]);
    cursor.setAttribute("x2", x[nearest]);
    chart.classList.add("hovered");
    showTip(text[nearest], event);
  });
  svg.addEventListener("pointerleave", () => {
    chart.classList.remove("hovered");
    tip.hidden = true;
  });
}

document.addEventListener("pointerover", (event) => {
  if (event.target.closest(".chart")) return;
  const source = event.target.closest("[data-tip]");
  if (source) showTip(source.dataset.tip, event);
  else tip.hidden = true;
});

const viewer = document.getElementById("viewer"); // a comparison's page has none
if (viewer) drawViewer(viewer, JSON.parse(document.getElementById("data").textContent));
