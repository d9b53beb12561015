/**
 * Keys for the whole page. Letters work where nobody writes: with the focus in the editor, or nowhere.
 * @param {Record<string, Function>} does
 */
export function listenToKeys(does) {
  const letters = {
    b: () => does.choose("brush"), e: () => does.choose("eraser"), x: () => does.choose("box"), l: () => does.choose("lasso"),
    h: () => does.choose("hand"), i: does.invert, "[": does.smaller, "]": does.larger, "?": does.help,
    "+": does["zoom-in"], "=": does["zoom-in"], "-": does["zoom-out"], 0: does["zoom-fit"],
  };
  document.addEventListener("keydown", (event) => {
    if (document.querySelector("dialog[open]") || event.defaultPrevented) return;
    let action = null;
    if (event.ctrlKey || event.metaKey) action = withControl(event, does);
    else if (event.key === "Escape") action = does.stop;
    else if (inEditor() && !event.altKey) action = letters[event.key];
    if (!action) return;
    event.preventDefault();
    action();
  });
}

function withControl(event, does) {
  const key = event.key.toLowerCase();
  if (key === "enter") return does.paint;
  // In a field, undo is the field's.
  if (document.activeElement.matches("input:not([type=radio], [type=range])")) return null;
  if (key === "z") return event.shiftKey ? does.redo : does.undo;
  return key === "y" ? does.redo : null;
}

function inEditor() {
  const at = document.activeElement;
  return at === document.body || document.querySelector("#editor").contains(at);
}
