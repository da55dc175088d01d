// A text and its hidden state as a file.

const MAX_BYTES = 4 * 1024 * 1024;
const FORMAT = "gru-serve state 1";

/** Save: portable is what Branch.state answers, text what the page shows. */
export function download(portable, text) {
  const content = JSON.stringify({ format: FORMAT, ...portable, text }, null, 1);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([content], { type: "application/json" }));
  link.download = `${portable.model.split("@")[0]}-${portable.position}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

/** {model, position, state, text} of a file. Throws Error. */
export async function read(file) {
  if (file.size > MAX_BYTES) throw new Error(`${file.name} is not a saved state: it is too large.`);
  let content = null;
  try {
    content = JSON.parse(await file.text());
  } catch {
    // said below
  }
  const isOurs = content?.format === FORMAT && typeof content.state === "string" && typeof content.model === "string";
  if (!isOurs || typeof content.text !== "string") throw new Error(`${file.name} is not a state that was saved here.`);
  return content;
}
