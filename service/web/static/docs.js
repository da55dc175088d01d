// Starts Swagger UI on the page at /docs. If the server requires an API key, the page asks for one first, unless the page at /
// has stored one in this tab.

const KEY = "gru-serve.key"; // as in page/api.js
const form = document.querySelector("#key");
let key = null;
try {
  key = sessionStorage.getItem(KEY);
} catch {
  // The browser blocks the storage.
}

// A header can't have other characters than ASCII, and no key has them.
const authorization = () => (key === null ? {} : { Authorization: `Bearer ${key.replace(/[^ -~]/g, "?")}` });

async function start() {
  const response = await fetch("openapi.json", { method: "HEAD", headers: authorization() }).catch(() => null);
  form.hidden = response?.status !== 401;
  if (!form.hidden) {
    const reason = key === null ? "This server requires an API key." : "The server does not know this API key.";
    form.querySelector("p").textContent = reason;
    form.elements.key.focus();
    return;
  }
  SwaggerUIBundle({
    url: "openapi.json",
    dom_id: "#swagger-ui",
    deepLinking: true,
    validatorUrl: null, // Swagger UI would otherwise send the API's description to a validator on another host
    requestInterceptor: (request) => {
      request.headers = { ...authorization(), ...request.headers }; // a key of the button "Authorize" wins
      return request;
    },
  });
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  key = form.elements.key.value.trim();
  form.reset();
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    // A reload asks again.
  }
  start();
});
start();
