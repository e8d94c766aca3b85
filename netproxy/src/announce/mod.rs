//! Balancer addresses on the node's link: one node answers for each, so that packets of neighbours come to it.
//!
//! `elect` says who (pure), `lease` knows from the API which nodes are alive, `keeper` puts both together and gives
//! `responder` the addresses of this node, which answers ARP and NDP (`frames`, pure) on packet sockets (`socket`) and
//! tells the segment unasked when an address has moved. The addresses are never put on a link: where the packets go is
//! decided by the Service proxy's rules.

mod elect;
mod frames;
mod keeper;
mod lease;
mod responder;
mod socket;

pub use elect::{Candidate, NodeId, World, node_id};
pub use keeper::{Identity, run};
