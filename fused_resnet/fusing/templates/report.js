(function () {
  var root = document.documentElement, button = document.getElementById("theme");
  function dark() {
    return (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  }
  function name() {
    button.textContent = dark() ? "Light colours" : "Dark colours";
    button.setAttribute("aria-pressed", String(dark()));
  }
  button.hidden = false;
  button.addEventListener("click", function () { root.dataset.theme = dark() ? "light" : "dark"; name(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", name);
  name();
  document.querySelectorAll("[data-open]").forEach(function (tool) {
    tool.hidden = false;
    tool.addEventListener("click", function () {
      document.querySelectorAll(".tree details").forEach(function (d) { d.open = tool.dataset.open === "all"; });
    });
  });
})();
