// An answer token by token: the ground of each tells how sure the model was, and on hover, on focus and on a tap a card
// says what else might have come. Arrow keys go from token to token, Escape closes the card.

const card = document.getElementById("odds");
const percent = (logprob) => `${(100 * Math.exp(logprob)).toFixed(1)} %`;

export function tokenNodes(tokens) {
  hide();
  const nodes = tokens.map(tokenNode);
  if (nodes.length) nodes[0].tabIndex = 0; // one stop for Tab, however long the answer is
  return nodes;
}

function tokenNode(told) {
  const node = document.createElement("span");
  node.className = "token";
  node.textContent = told.token;
  node.tabIndex = -1;
  node.style.background = `color-mix(in srgb, var(--bad) ${Math.round(55 * (1 - Math.exp(told.logprob)))}%, transparent)`;
  node.setAttribute("aria-describedby", "odds");
  node.onpointerenter = node.onclick = () => show(node, told);
  node.onpointerleave = (event) => event.pointerType === "mouse" && hide(); // a finger leaves as soon as it is lifted
  node.onfocus = () => {
    for (const other of node.parentNode.querySelectorAll('[tabindex="0"]')) other.tabIndex = -1;
    node.tabIndex = 0;
    show(node, told);
  };
  node.onblur = hide;
  node.onkeydown = (event) => {
    if (event.key === "ArrowRight") node.nextElementSibling?.focus();
    else if (event.key === "ArrowLeft") node.previousElementSibling?.focus();
    else if (event.key === "Escape") hide();
    else return;
    event.preventDefault();
    event.stopPropagation();
  };
  return node;
}

function show(node, { token, logprob, top_logprobs: others }) {
  const known = others.some((other) => other.token === token);
  const rows = known ? others : [{ token, logprob }, ...others];
  card.replaceChildren(
    ...rows.map((row) => {
      const line = document.createElement("div");
      line.className = row.token === token ? "chosen" : "";
      line.append(cell(percent(row.logprob)), cell(JSON.stringify(row.token)));
      return line;
    }),
  );
  card.hidden = false;
  const [at, size] = [node.getBoundingClientRect(), card.getBoundingClientRect()];
  const below = at.bottom + 6 + size.height < innerHeight;
  card.style.left = `${Math.max(8, Math.min(at.left, innerWidth - size.width - 8))}px`;
  card.style.top = `${below ? at.bottom + 6 : Math.max(8, at.top - size.height - 6)}px`;
}

function cell(text) {
  const node = document.createElement("span");
  node.textContent = text;
  return node;
}

function hide() {
  card.hidden = true;
}

document.getElementById("conversation").addEventListener("scroll", hide);
