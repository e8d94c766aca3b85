//! What a fuzzer does to answers of the kernel: has any bytes read as messages about everything that is ever asked for.

use crate::wire::{FIRST_FAMILY_TYPE, Received, messages};
use crate::{address, bridge, conntrack, link, neighbour, route, vlan};

/// One input, as one datagram. Any behaviour but answers or none is a panic.
pub fn answers(data: &[u8]) {
    for message in messages(data) {
        // Links, addresses, routes, neighbours: what a message is about is not left to chance.
        for kind in [message.kind, FIRST_FAMILY_TYPE, 20, 24, 28] {
            let message = Received { kind, ..message };
            let _ = (link::parse(&message), bridge::parse(&message), address::parse(&message));
            let _ = (neighbour::parse(&message), route::parse(&message, 79), vlan::parse(&message, 1));
        }
        let _ = conntrack::parse(message.payload);
    }
}
