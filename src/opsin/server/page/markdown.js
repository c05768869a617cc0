// Markdown to DOM nodes. Models' text is never parsed as HTML, so nothing in it can run.

const INLINE = /(`+)([^`]|[^`][\s\S]*?[^`])\1(?!`)|\*\*(?=\S)([\s\S]*?\S)\*\*|\*(?=\S)([^*\n]*?\S)\*|~~(?=\S)([\s\S]*?\S)~~|\[([^\]\n]*)\]\((https?:\/\/[^\s)]+)\)/;

export function markdown(text) {
  const root = document.createDocumentFragment();
  const lines = text.split("\n");
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    let match;
    if (!line.trim()) {
      at += 1;
    } else if ((match = /^\s*(```+|~~~+)\s*(\S*)/.exec(line))) {
      at = fence(root, lines, at, match[1]);
    } else if ((match = /^(#{1,6})\s+(.*)/.exec(line))) {
      root.append(element(`h${Math.min(match[1].length + 2, 6)}`, match[2]));
      at += 1;
    } else if (isItem(line)) {
      at = list(root, lines, at);
    } else if (line.startsWith("|") && /^\|?[\s:|-]+\|[\s:|-]*$/.test(lines[at + 1] ?? "")) {
      at = table(root, lines, at);
    } else if (/^>\s?/.test(line)) {
      const quoted = [];
      while (at < lines.length && /^>\s?/.test(lines[at])) quoted.push(lines[at++].replace(/^>\s?/, ""));
      const quote = document.createElement("blockquote");
      quote.append(markdown(quoted.join("\n")));
      root.append(quote);
    } else {
      const paragraph = [lines[at++]]; // a line that begins nothing else; so this always moves on
      while (at < lines.length && lines[at].trim() && !/^\s*(```|~~~|#{1,6}\s|>)/.test(lines[at]) && !isItem(lines[at])) {
        paragraph.push(lines[at++]);
      }
      root.append(element("p", paragraph.join("\n")));
    }
  }
  return root;
}

const isItem = (line) => /^\s*([-*+]|\d+[.)])\s+/.test(line);

function fence(root, lines, at, mark) {
  const code = [];
  for (at += 1; at < lines.length && !lines[at].trim().startsWith(mark); at += 1) code.push(lines[at]);
  const block = document.createElement("pre");
  block.append(document.createElement("code"));
  block.firstChild.textContent = code.join("\n");
  root.append(block);
  return at + 1;
}

function list(root, lines, at) {
  const indent = lines[at].search(/\S/);
  const ordered = /^\s*\d/.test(lines[at]);
  const parent = document.createElement(ordered ? "ol" : "ul");
  if (ordered) parent.start = Number.parseInt(lines[at].trim(), 10);
  while (at < lines.length && (isItem(lines[at]) || (lines[at].trim() && lines[at].search(/\S/) > indent))) {
    if (lines[at].search(/\S/) < indent) break;
    if (!isItem(lines[at])) {
      parent.lastElementChild.append(document.createTextNode("\n"), inline(lines[at++].trim()));
    } else if (lines[at].search(/\S/) > indent) {
      at = list(parent.lastElementChild, lines, at);
    } else {
      parent.append(element("li", lines[at++].replace(/^\s*([-*+]|\d+[.)])\s+/, "")));
    }
  }
  root.append(parent);
  return at;
}

function table(root, lines, at) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|");
  const body = document.createElement("table");
  const add = (line, kind) => {
    const row = document.createElement("tr");
    row.append(...cells(line).map((cell) => element(kind, cell.trim())));
    body.append(row);
  };
  add(lines[at], "th");
  for (at += 2; at < lines.length && lines[at].startsWith("|"); at += 1) add(lines[at], "td");
  root.append(body);
  return at;
}

function element(name, text) {
  const node = document.createElement(name);
  node.append(inline(text));
  return node;
}

function inline(text) {
  const nodes = document.createDocumentFragment();
  for (let match; (match = INLINE.exec(text)); text = text.slice(match.index + match[0].length)) {
    nodes.append(text.slice(0, match.index));
    const [whole, , code, strong, emphasis, struck, label, address] = match;
    if (code !== undefined) {
      const node = document.createElement("code");
      node.textContent = code.trim();
      nodes.append(node);
    } else if (address !== undefined) {
      const node = document.createElement("a");
      Object.assign(node, { href: address, rel: "noopener noreferrer", target: "_blank", textContent: label || address });
      nodes.append(node);
    } else {
      nodes.append(element(strong !== undefined ? "strong" : emphasis !== undefined ? "em" : "s", strong ?? emphasis ?? struck ?? whole));
    }
  }
  nodes.append(text);
  return nodes;
}
