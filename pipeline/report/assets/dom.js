// Elements, and numbers as this page writes them. Texts of models go into the page as text, never as markup.

/** An element with attributes and children; a child that is a string becomes text. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "onclick") element.addEventListener("click", value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function byId(id) { return document.getElementById(id); }

/** A number with a fixed count of decimals; a dash where there is none. */
function shown(value, digits = 3) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const text = Math.abs(value).toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
  return value < 0 && /[1-9]/.test(text) ? `−${text}` : text;
}

function signed(value, digits = 3) {
  const text = shown(value, digits);
  return text.startsWith("−") || text === "–" ? text : `+${text}`;
}

function interval(ends, digits = 3) {
  return ends && ends.every(Number.isFinite) ? `[${shown(ends[0], digits)}, ${shown(ends[1], digits)}]` : "";
}

/** Decimals that suit numbers of this spread: three for the usual scores. */
function decimalsFor(...values) {
  const finite = values.filter(Number.isFinite);
  const spread = finite.length ? Math.max(...finite) - Math.min(...finite) : 0;
  if (!(spread > 0)) return 3;
  const size = Math.floor(Math.log10(spread));
  return spread < 0.05 ? Math.min(8, 2 - size) : Math.max(0, 3 - Math.max(0, size));
}

function percent(share) { return `${shown(100 * share, 1)}%`; }

/** Hand a text over as a file. */
function saveFile(name, text, kind) {
  const link = make("a", { href: URL.createObjectURL(new Blob([text], { type: kind })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function csvOf(rows) {
  const cell = (value) => (/[",\n]/.test(String(value)) ? `"${String(value).replaceAll('"', '""')}"` : String(value));
  return rows.map((row) => row.map(cell).join(",")).join("\n") + "\n";
}

/** At most once a frame, with the latest arguments. */
function eachFrame(action) {
  let waiting = false;
  return () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; action(); });
  };
}
