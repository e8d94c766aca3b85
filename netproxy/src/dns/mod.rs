//! Cluster DNS of this node: names of Services from the same watch that routes them, everything else from the node's own
//! resolvers.
//!
//! **How pods and the node reach it.** The cluster DNS address is put on `lo` with scope `host`, and plain sockets are bound
//! to it. That works before any pod or bridge exists, for the node itself as for pods (whose packets are routed to the
//! node, where the address is local), in any number of network namespaces at once, and it takes no dummy link, which some
//! kernels lack. Scope `host` keeps the kernel from ever choosing it as a source for anything else. Answers leave from a
//! bound socket, so they carry the right source without NAT and without connection tracking's help. A redirect rule was
//! rejected: it needs another address to redirect to, and a rewritten connection for each query. Packets from outside the
//! cluster are dropped by a rule of our table.
//!
//! When the Service with that address has endpoints (a CoreDNS that was installed), its map elements catch the packets before
//! they are delivered locally, so the replacement takes over by itself.
//!
//! `answer` is pure: a question and the cluster's state in, records out. `server` owns sockets, `upstream` forwarding and its
//! cache, `flight` equal questions, `ask` a question to one resolver, `loops` what would never be answered.

mod answer;
mod ask;
mod cache;
mod flight;
mod loops;
mod server;
mod upstream;

pub use answer::Zone;
pub use loops::watch as watch_loops;
#[cfg(any(test, feature = "fuzzing"))]
pub use server::exchange;
pub use server::{Counts, DnsServer, Sockets};
pub use upstream::{StubDomains, Upstream};
