// The page of a run: what its script adds to what it says without one.

async function start() {
  if (typeof DecompressionStream === "undefined") return;
  const data = await readData();
  const populations = Object.fromEntries(Object.entries(data.populations).map(([name, packed]) => [name, responsesOf(packed)]));
  // Containers have a width only when they are shown, and charts are as wide as those.
  document.documentElement.classList.add("has-script");
  const explored = startExplore(data, populations.train ?? null);
  const redrawDistributions = startDistributions(data, populations, explored);
  startResponses(data, populations, explored);
  addPlateFiles();
  const redraw = eachFrame(() => { explored?.redraw(); redrawDistributions?.(); });
  addEventListener("resize", redraw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  document.documentElement.dataset.ready = "true";
}

/** Each figure of the page as SVG: it is in the page already, as the source of its picture. */
function addPlateFiles() {
  for (const image of document.querySelectorAll(".plate img[src^='data:image/svg']")) {
    const files = image.closest("figure").querySelector(".files") ?? image.closest("figure").querySelector("figcaption").appendChild(make("span", { class: "files" }));
    files.prepend(make("a", { href: image.src, download: `${image.dataset.file}.svg`, "aria-label": `${image.dataset.file} as SVG` }, "SVG"));
  }
}

start();
