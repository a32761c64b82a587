/* Search runs in a worker, which browsers refuse to pages opened from a folder. There a hidden frame stands in for it.
   The name is the one by which mkdocs-material's plugin `offline` knows that it need not fetch its own from another host. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      frame.reply = data => {
        const event = new MessageEvent("message", {data});
        this.onmessage?.(event);
        this.dispatchEvent(event);
      };
      frame.srcdoc = `<script>var postMessage = data => frameElement.reply(data)</script><script src="${url}"></script>`;
      this.ready = new Promise(resolve => { frame.onload = () => resolve(frame.contentWindow); });
      document.body.append(frame);
    }
    postMessage(data) {
      this.ready.then(inside => inside.dispatchEvent(new MessageEvent("message", {data})));
    }
    terminate() {}
  };
}
