//! Two connections over one socket: each piece of data is preceded by the number of its connection and its length.
//!
//! Pure: bytes in, bytes out. How a message is cut into pieces matters to plugins: theirs is a buffered reader of 4096 bytes
//! that takes a piece as a whole, so the first piece of a message may be no longer than that, and what follows is one piece.

/// The connection on which the plugin serves the runtime.
pub(crate) const PLUGIN: u32 = 1;
/// The connection on which the runtime serves the plugin.
pub(crate) const RUNTIME: u32 = 2;

/// Connection and length, 4 bytes each, the most significant first.
pub(crate) const HEADER_BYTES: usize = 8;
/// Longest piece taken: the longest message with its header.
pub(crate) const PIECE_BYTES_MAX: usize = crate::ttrpc::HEADER_BYTES + crate::ttrpc::DATA_BYTES_MAX;
const FIRST_PIECE_BYTES: usize = 4096;

/// One message as it is written to the socket.
pub(crate) fn cut(connection: u32, message: &[u8]) -> Vec<u8> {
    let (first, rest) = message.split_at(message.len().min(FIRST_PIECE_BYTES));
    let mut out = Vec::with_capacity(message.len() + 2 * HEADER_BYTES);
    for piece in [first, rest].into_iter().filter(|piece| !piece.is_empty()) {
        out.extend_from_slice(&connection.to_be_bytes());
        out.extend_from_slice(&(piece.len() as u32).to_be_bytes());
        out.extend_from_slice(piece);
    }
    out
}

/// The connection and the length that a header tells.
pub(crate) fn header(bytes: [u8; HEADER_BYTES]) -> (u32, usize) {
    let [a, b, c, d, e, f, g, h] = bytes;
    (u32::from_be_bytes([a, b, c, d]), u32::from_be_bytes([e, f, g, h]) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_message_is_a_piece_that_fits_a_buffer_and_the_rest() {
        let message = vec![7; 10_000];
        let bytes = cut(PLUGIN, &message);
        let (connection, length) = header(bytes[..8].try_into().unwrap());
        assert_eq!((connection, length), (1, 4096));
        let rest = &bytes[8 + 4096..];
        assert_eq!(header(rest[..8].try_into().unwrap()), (1, 10_000 - 4096));
        assert_eq!(rest.len(), 8 + 10_000 - 4096);
    }

    #[test]
    fn a_short_message_is_one_piece() {
        assert_eq!(cut(RUNTIME, b"abc"), [0, 0, 0, 2, 0, 0, 0, 3, b'a', b'b', b'c']);
    }
}
