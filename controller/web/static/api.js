// The controller's API as a signed-in browser uses it. The token is sent once, in a body; what remains is a
// cookie that scripts cannot read and that can only read, so EventSource works and no URL holds a secret.

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function request(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { cache: "no-store", credentials: "same-origin", ...options });
  } catch {
    throw new ApiError(0, "the controller cannot be reached");
  }
  if (!response.ok) {
    const body = await response.json().catch(() => null);
    throw new ApiError(response.status, body?.error?.message || `the controller answered ${response.status}`);
  }
  return response;
}

export async function signIn(token) {
  const headers = { "Content-Type": "application/json" };
  await request("api/v1/session", { method: "POST", headers, body: JSON.stringify({ token }) });
}

export async function signOut() {
  await request("api/v1/session", { method: "DELETE" });
}

export async function overview() {
  return (await request("api/v1/overview")).json();
}

export async function find(plural) {
  return (await (await request(`api/v1/${plural}`)).json()).items;
}

export async function reports(device, limit) {
  const path = `api/v1/devices/${encodeURIComponent(device)}/reports?limit=${limit}`;
  return (await (await request(path)).json()).items;
}

// Calls `onChange` for every event and once per connection; `onLost` while there is none. Returns what closes it.
export function follow(onOpen, onChange, onLost) {
  let source = null;
  let timer = 0;
  const open = () => {
    source = new EventSource("api/v1/events");
    source.addEventListener("open", onOpen);
    source.addEventListener("changed", onChange);
    source.addEventListener("error", () => {
      onLost();
      // The browser tries again by itself, unless the answer was an error.
      if (source.readyState === EventSource.CLOSED) timer = setTimeout(open, 3000);
    });
  };
  open();
  return () => {
    clearTimeout(timer);
    source.close();
  };
}
