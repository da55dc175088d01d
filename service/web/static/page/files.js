// Saves a text with its hidden state to a file, and reads such a file.

const MAX_BYTES = 4 * 1024 * 1024;
const FORMAT = "gru-serve state 1";

/** Save a file. portable: the response of Branch.portableState. text: the text that the page shows. */
export function download(portable, text) {
  const content = JSON.stringify({ format: FORMAT, ...portable, text }, null, 1);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([content], { type: "application/json" }));
  link.download = `${portable.model.split("@")[0]}-${portable.position}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

/** Return {model, position, state, text} of a file. Throws Error if it is not such a file. */
export async function read(file) {
  if (file.size > MAX_BYTES) throw new Error(`${file.name} is too large to be a saved state (at most 4 MiB).`);
  let content = null;
  try {
    content = JSON.parse(await file.text());
  } catch {
    // null is refused below
  }
  const isState = content?.format === FORMAT && typeof content.state === "string" && typeof content.model === "string";
  if (!isState || typeof content.text !== "string") throw new Error(`${file.name} is not a state that this page saved.`);
  return content;
}
