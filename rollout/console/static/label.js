// Keys for the labeling page. Everything works without them, by mouse and by Tab.
"use strict";

const choices = { "1": "first", "2": "second", "3": "both", "4": "neither" };
const form = document.getElementById("label");
const correction = document.getElementById("correction");

function send(button) {
  if (button && !form.dataset.sent) form.requestSubmit(button);
}

function choose(choice) {
  send(form.querySelector(`button[value="${choice}"]`));
}

document.addEventListener("keydown", (event) => {
  if (!form) return;
  if (document.activeElement === correction) {
    if (event.key === "Escape") correction.blur();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) choose("neither");
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if (event.key in choices) choose(choices[event.key]);
  else if (event.key === "s") send(document.getElementById("skip"));
  else if (event.key === "c") correction.focus();
  else return;
  event.preventDefault();
});

if (form) {
  form.addEventListener("submit", (event) => {
    // A second press while the first is on its way would label the next case unseen.
    if (form.dataset.sent) event.preventDefault();
    form.dataset.sent = "yes";
  });
  // A page that comes back from the history has been sent once.
  window.addEventListener("pageshow", () => delete form.dataset.sent);
}
