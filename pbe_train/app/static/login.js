// The login page: sends the password and opens the first page.

const form = document.getElementById("login");
const password = document.getElementById("password");
const error = document.getElementById("error");

// After a click on another site the browser kept the cookie back; from here it sends it.
fetch("/api/models").then((answer) => answer.ok && location.replace("/"));

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  error.textContent = "";
  try {
    const answer = await fetch("/api/login", {
      method: "POST",
      headers: { "Content-Type": "application/json", "X-PBE": "1" },
      body: JSON.stringify({ password: password.value }),
    });
    if (answer.ok) location.replace("/");
    else {
      const sentence = (await answer.json()).error;
      error.textContent = `${sentence[0].toUpperCase()}${sentence.slice(1)}.`;
    }
  } catch {
    error.textContent = "The server does not answer.";
  }
  password.select();
});
