// The lowest contrast (WCAG 2.2, section 1.4.3) of the text of each kind of element that shows.
() => {
  const rgb = text => { const [r, g, b, a = 1] = text.match(/[\d.]+/g).map(Number); return {r, g, b, a}; };
  const light = ({r, g, b}) => [r, g, b].map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = element => {
    let layers = [];
    for (let e = element; e; e = e.parentElement) {
      const text = getComputedStyle(e).backgroundColor;
      if (text.startsWith("rgb")) { const c = rgb(text); if (c.a > 0) layers.push(c); if (c.a === 1) break; }
    }
    return layers.reverse().reduce((under, c) => ({
      r: c.r * c.a + under.r * (1 - c.a), g: c.g * c.a + under.g * (1 - c.a), b: c.b * c.a + under.b * (1 - c.a)}));
  };
  const found = {};
  for (const element of document.querySelectorAll("body *")) {
    if (!element.checkVisibility() || element.closest("svg") && element.tagName !== "text") continue;
    if (![...element.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
    const style = getComputedStyle(element);
    const [a, b] = [rgb(element.tagName === "text" ? style.fill : style.color), behind(element)].map(light);
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    const name = element.tagName + "." + (element.getAttribute("class") || "");
    found[name] = Math.min(found[name] ?? 99, ratio);
  }
  return found;
}
