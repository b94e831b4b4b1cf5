// The controller's API. The token travels in a header only: EventSource cannot send one and a token in a
// URL ends up in logs, so server-sent events are read from a fetch stream.

const KEY = "edgeward-token";

export const token = {
  get: () => sessionStorage.getItem(KEY) || "",
  set: (value) => sessionStorage.setItem(KEY, value),
  clear: () => sessionStorage.removeItem(KEY),
};

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function request(path, signal) {
  let response;
  try {
    response = await fetch(path, { headers: { Authorization: `Bearer ${token.get()}` }, signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "the controller cannot be reached");
  }
  if (!response.ok) {
    const body = await response.json().catch(() => null);
    throw new ApiError(response.status, body?.error?.message || `the controller answered ${response.status}`);
  }
  return response;
}

export async function find(plural) {
  return (await (await request(`api/v1/${plural}`)).json()).items;
}

export async function reports(device, limit) {
  const path = `api/v1/devices/${encodeURIComponent(device)}/reports?limit=${limit}`;
  return (await (await request(path)).json()).items;
}

// Calls `onOpen` once connected and `onEvent` for every event; returns or throws when the stream ends.
export async function follow(signal, onOpen, onEvent) {
  const response = await request("api/v1/events", signal);
  onOpen();
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value.replaceAll("\r", "")).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      // A block of comments only (": ping") keeps the connection open and says nothing.
      if (block.split("\n").some((line) => line.startsWith("data"))) onEvent();
    }
  }
}
