//! WebSocket: channels in messages for exec and attach, and a plain byte stream for tunnelled SPDY.

mod bytes_stream;
mod command;
mod message;

use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};

pub(crate) use bytes_stream::MessageBytes;
pub(crate) use command::serve as serve_command;

/// One message of a client at most.
const MESSAGE_LIMIT_BYTES: usize = 1024 * 1024;

/// The server's end of an upgraded connection.
pub(crate) async fn server<IO: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin>(io: IO) -> WebSocketStream<IO> {
    let config = WebSocketConfig::default()
        .max_message_size(Some(MESSAGE_LIMIT_BYTES))
        .max_frame_size(Some(MESSAGE_LIMIT_BYTES))
        .read_buffer_size(32 * 1024)
        .write_buffer_size(0)
        .max_write_buffer_size(4 * MESSAGE_LIMIT_BYTES);
    WebSocketStream::from_raw_socket(io, Role::Server, Some(config)).await
}
