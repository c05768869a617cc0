import { markdown } from "./markdown.js";
import { tokenNodes } from "./tokens.js";

const $ = (id) => document.getElementById(id);
const turns = []; // {role, text, thought, pictures: [{url, name}], tokens: [{token, logprob, top_logprobs}], node, thoughts}
let pending = []; // pictures that go with the next message
let running = null; // the AbortController of the answer that is being written

// ------------------------------------------------------------------------------------------------ the server

const headers = () => ({ "Content-Type": "application/json", ...($("key").value && { Authorization: `Bearer ${$("key").value}` }) });

async function ask(path, body, signal) {
  const response = await fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
  if (response.ok) return response;
  const said = await response.json().catch(() => null);
  throw new Error(said?.error?.message ?? `The server answered ${response.status}.`);
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("The connection was lost before the answer ended.");
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue;
      if (part === "data: [DONE]") return;
      const event = JSON.parse(part.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

async function showModel() {
  try {
    const response = await fetch("v1/models", { headers: headers() });
    if (response.status === 401) {
      $("model").textContent = "needs an API key";
      toggleSettings(true);
    } else {
      $("model").textContent = (await response.json()).data[0].id;
    }
  } catch {
    $("model").textContent = "not reachable";
  }
}

// ------------------------------------------------------------------------------------------------- asking

function messages() {
  const system = $("system").value.trim();
  const told = turns.filter((turn) => turn.role === "user" || turn.text);
  return [
    ...(system ? [{ role: "system", content: system }] : []),
    ...told.map(({ role, text, pictures }) => ({
      role,
      content: pictures.length
        ? [...pictures.map(({ url }) => ({ type: "image_url", image_url: { url } })), ...(text ? [{ type: "text", text }] : [])]
        : text,
    })),
  ];
}

function settings() {
  const body = {};
  for (const name of ["temperature", "top_p", "max_tokens", "seed"]) {
    if ($(name).value !== "") body[name] = Number($(name).value);
  }
  return body;
}

async function send() {
  const text = $("text").value.trim();
  if (running || !(text || pending.length)) return;
  addTurn({ role: "user", text, pictures: pending, tokens: [] });
  pending = [];
  showPending();
  $("text").value = "";
  grow();
  await answer();
}

async function answer() {
  const body = {
    messages: messages(), ...settings(),
    stream: true, stream_options: { include_usage: true }, logprobs: true, top_logprobs: 5,
  };
  const turn = addTurn({ role: "assistant", text: "", thought: "", pictures: [], tokens: [] });
  running = new AbortController();
  showRunning(true);
  turn.times = { start: performance.now() };
  try {
    for await (const event of events(await ask("v1/chat/completions", body, running.signal))) {
      if (event.usage) turn.usage = event.usage;
      const choice = event.choices[0];
      if (!choice) continue;
      turn.tokens.push(...(choice.logprobs?.content ?? []));
      if (choice.finish_reason) turn.ended = choice.finish_reason;
      if (!choice.delta.content && !choice.delta.reasoning) continue;
      turn.times.last = performance.now();
      turn.times.first ??= turn.times.last;
      turn.thought += choice.delta.reasoning ?? "";
      turn.text += choice.delta.content ?? "";
      drawSoon(turn);
    }
  } catch (error) {
    if (error.name === "AbortError") turn.ended = "stopped";
    else turn.error = error.message;
  } finally {
    running = null;
    showRunning(false);
    draw(turn);
    $("text").focus();
  }
}

// ------------------------------------------------------------------------------------------------ turns

function addTurn(turn) {
  $("hint")?.remove();
  turn.node = document.createElement("article");
  turn.node.className = turn.role;
  turns.push(turn);
  $("conversation").append(turn.node);
  draw(turn);
  turn.node.scrollIntoView({ block: "end" });
  return turn;
}

function drawSoon(turn) {
  if (turn.frame) return;
  turn.frame = requestAnimationFrame(() => {
    turn.frame = 0;
    const main = $("conversation");
    const follows = main.scrollHeight - main.scrollTop - main.clientHeight < 80;
    draw(turn);
    if (follows) main.scrollTop = main.scrollHeight;
  });
}

function draw(turn) {
  const pictures = make("ul", { className: "pictures" });
  for (const picture of turn.pictures) {
    const button = make("button", { type: "button", title: "What the model saw" }, make("img", { src: picture.url, alt: picture.name }));
    button.onclick = () => showSeen(picture);
    pictures.append(make("li", {}, button));
  }
  const text = make("div", { className: "text" });
  if (turn.role === "user") text.textContent = turn.text;
  else if (turn.showsTokens) text.append(...tokenNodes(turn.tokens));
  else text.append(markdown(turn.text));
  text.classList.toggle("waiting", turn.role === "assistant" && !turn.text && !turn.error && !turn.ended);
  turn.node.ariaBusy = String(running !== null && turn === turns.at(-1)); // read out once it is whole, not at every token
  const parts = [pictures, text];
  if (turn.error) parts.push(make("p", { className: "error", role: "alert", textContent: turn.error }));
  parts.push(facts(turn));
  if (turn.thought) showThoughts(turn);
  for (const old of [...turn.node.children]) if (old !== turn.thoughts) old.remove();
  turn.node.append(...parts);
}

function showThoughts(turn) {
  if (!turn.thoughts) { // which stay: a click on what is replaced at every token would be lost
    turn.thoughts = make("details", { className: "thoughts" }, make("summary", { textContent: "Thoughts" }), make("div"));
    turn.node.prepend(turn.thoughts);
  }
  turn.thoughts.lastElementChild.textContent = turn.thought;
}

function facts(turn) {
  const row = make("div", { className: "facts" });
  const button = (label, action) => {
    const node = make("button", { type: "button", textContent: label });
    node.onclick = action;
    row.append(node);
  };
  if (turn.role === "user") {
    button("Edit", () => edit(turn));
    return row;
  }
  const { times, usage } = turn;
  const say = (text) => row.append(make("span", { textContent: text }));
  if (times?.first) say(`${Math.round(times.first - times.start)} ms to first token`);
  if (usage && times?.last > times?.first) {
    say(`${((usage.completion_tokens - 1) / ((times.last - times.first) / 1000)).toFixed(1)} tokens/s`);
  }
  if (usage) {
    const shown = usage.prompt_tokens_details?.multimodal_tokens;
    const thought = usage.completion_tokens_details?.reasoning_tokens;
    say(
      `${usage.prompt_tokens} tokens in${shown ? `, ${shown} of them pictures` : ""}, ` +
        `${usage.completion_tokens} out${thought ? `, ${thought} of them thoughts` : ""}`,
    );
  }
  if (turn.ended === "length") say("cut at the longest answer");
  if (turn.ended === "stopped") say("stopped");
  if (turn.ended || turn.error) button("Again", () => retry(turn));
  if (turn.tokens.length) {
    button(turn.showsTokens ? "Text" : "Tokens", () => {
      turn.showsTokens = !turn.showsTokens;
      draw(turn);
      turn.node.querySelector(".facts button:last-child").focus(); // the one that was pressed is gone
    });
  }
  return row;
}

function cut(turn) {
  for (const gone of turns.splice(turns.indexOf(turn))) gone.node.remove();
}

function edit(turn) {
  running?.abort();
  cut(turn);
  $("text").value = turn.text;
  pending = turn.pictures;
  showPending();
  grow();
  $("text").focus();
}

function retry(turn) {
  if (running) return;
  cut(turn);
  answer();
}

// ---------------------------------------------------------------------------------------------- pictures

function readFile(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve({ url: reader.result, name: file.name || "picture" });
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

async function addFiles(files) {
  const pictures = [...files].filter((file) => file.type.startsWith("image/"));
  $("notice").textContent = pictures.length < files.length ? "Only pictures can be sent along." : "";
  pending.push(...(await Promise.all(pictures.map(readFile))));
  showPending();
  $("text").focus();
}

function showPending() {
  $("pictures").replaceChildren(
    ...pending.map((picture) => {
      const name = `Remove ${picture.name}`;
      const remove = make("button", { type: "button", title: name, ariaLabel: name, textContent: "×" });
      remove.onclick = () => {
        pending = pending.filter((other) => other !== picture);
        showPending();
        $("text").focus();
      };
      return make("li", {}, make("img", { src: picture.url, alt: picture.name }), remove);
    }),
  );
}

async function showSeen(picture) {
  const place = $("seen").lastElementChild;
  place.replaceChildren("Looking …");
  $("seen").showModal();
  try {
    const seen = await (await ask("page/seen", { image_url: picture.url })).json();
    const heading = make("p", {
      textContent: `${seen.width} × ${seen.height} pixels came in; the model sees ${seen.num_tokens} tokens of it` +
        (seen.views.length > 1 ? ` in ${seen.views.length} views.` : "."),
    });
    place.replaceChildren(heading, ...(await Promise.all(seen.views.map(viewNode))));
  } catch (error) {
    place.replaceChildren(make("p", { className: "error", textContent: error.message }));
  }
}

async function viewNode({ columns, tiles, grid }) {
  const node = make("div", { className: "tiles" });
  node.style.gridTemplateColumns = `repeat(${columns}, auto)`;
  for (const tile of tiles) {
    const image = new Image();
    image.src = tile;
    await image.decode();
    const scale = Math.max(1, Math.floor(480 / (image.width * columns))); // small tiles are shown larger, whole pixels
    const [width, height] = [image.width * scale, image.height * scale];
    const canvas = make("canvas", { width, height });
    const brush = canvas.getContext("2d");
    brush.imageSmoothingEnabled = false;
    brush.drawImage(image, 0, 0, width, height);
    if (grid) {
      brush.strokeStyle = "rgb(255 255 255 / 45%)";
      for (let i = 1; i < grid.columns; i += 1) line(brush, (i * width) / grid.columns, 0, 0, height);
      for (let i = 1; i < grid.rows; i += 1) line(brush, 0, (i * height) / grid.rows, width, 0);
    }
    node.append(canvas);
  }
  return node;
}

function line(brush, x, y, dx, dy) {
  brush.beginPath();
  brush.moveTo(x, y);
  brush.lineTo(x + dx, y + dy);
  brush.stroke();
}

// --------------------------------------------------------------------------------------------- the rest

function make(name, properties, ...children) {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
}

function showRunning(is) {
  $("send").hidden = is;
  $("stop").hidden = !is;
}

function grow() {
  $("text").style.height = "auto";
  $("text").style.height = `${$("text").scrollHeight + 2}px`;
}

function toggleSettings(open = $("settings").hidden) {
  $("settings").hidden = !open;
  $("show-settings").setAttribute("aria-expanded", String(open));
}

$("composer").onsubmit = (event) => {
  event.preventDefault();
  send();
};
$("settings").onsubmit = (event) => event.preventDefault();
$("text").oninput = grow;
$("text").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
};
$("stop").onclick = () => running?.abort();
$("show-settings").onclick = () => toggleSettings();
$("key").onchange = showModel;
$("clear").onclick = () => {
  running?.abort();
  if (turns.length) cut(turns[0]);
};
$("files").onchange = (event) => {
  addFiles(event.target.files);
  event.target.value = "";
};
document.onkeydown = (event) => {
  if (event.key === "Escape" && !$("seen").open) running?.abort();
};
document.onpaste = (event) => {
  if (event.clipboardData.files.length) {
    event.preventDefault();
    addFiles(event.clipboardData.files);
  }
};
document.ondragover = (event) => {
  if (!event.dataTransfer.types.includes("Files")) return; // text may be dropped where it is written
  event.preventDefault();
  document.body.classList.add("dropping");
};
document.ondragleave = (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dropping");
};
document.ondrop = (event) => {
  document.body.classList.remove("dropping");
  if (!event.dataTransfer.files.length) return;
  event.preventDefault();
  addFiles(event.dataTransfer.files);
};

showModel();
