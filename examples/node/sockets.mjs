// What zeromq.js leaves to its user: closing a socket ends whoever waits for its messages or events, at times with an error.

/** The messages of a socket, until it is closed. */
export const messages = (socket) => untilClosed(socket, socket);

/** Calls `broken` each time that the connection of a socket breaks. Not by `events.on`, whose errors nobody can catch. */
export async function onDisconnect(socket, broken) {
  for await (const event of untilClosed(socket, socket.events)) if (event.type === 'disconnect') broken();
}

async function* untilClosed(socket, source) {
  try {
    yield* source;
  } catch (error) {
    if (!socket.closed) throw error;
  }
}
