//! SPDY/3.1 as kubectl, crictl and the kubelet speak it: framing, header compression, and a session with its streams.

mod dictionary;
mod frame;
mod headers;
mod session;
mod stream;
mod window;

#[cfg(test)]
pub(crate) use headers::Headers;
pub(crate) use session::{Role, Session};
pub(crate) use stream::Stream;
