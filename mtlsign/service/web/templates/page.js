// Adds to the pages: buttons that copy an id, and the progress of an upload. All pages work without it.
"use strict";

for (const code of document.querySelectorAll("code.id")) {
  if (!navigator.clipboard) break;
  const button = document.createElement("button");
  button.type = "button";
  button.className = "plain copy";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(code.dataset.value ?? code.textContent);
    button.textContent = "Copied";
  });
  code.after(" ", button);
}

const form = document.querySelector("form[data-progress]");
if (form) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const bar = form.querySelector("progress");
    const status = form.querySelector("[role=status]");
    const button = form.querySelector("button");
    const request = new XMLHttpRequest();
    const fail = (text) => {
      bar.hidden = true;
      button.disabled = false;
      status.textContent = text;
    };
    request.open("POST", form.action);
    request.setRequestHeader("Accept", "application/problem+json");
    request.upload.addEventListener("progress", (sent) => {
      const percent = Math.floor((100 * sent.loaded) / sent.total);
      bar.value = percent;
      status.textContent = percent < 100 ? `${percent} % sent` : "The service checks the file…";
    });
    request.addEventListener("load", () => {
      if (request.status < 400) {
        window.location.assign(request.responseURL);
        return;
      }
      try {
        fail(JSON.parse(request.responseText).detail);
      } catch {
        fail(`The service answers with status ${request.status}. Try again.`);
      }
    });
    request.addEventListener("error", () => fail("The connection was lost. Try again."));
    bar.hidden = false;
    button.disabled = true;
    request.send(new FormData(form));
  });
}
