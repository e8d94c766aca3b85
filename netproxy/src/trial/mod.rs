//! Trials: random Services of a cluster by seed, what the documentation says should become of packets to them, and what the
//! planned tables make of the same packets. Owns the cases, the model and the tracer's side; the kernel's side, with real
//! packets, is the privileged tests'. Part of tests only.

mod case;
mod generate;
mod model;
mod objects;
mod tracer;

pub use case::{
    Case, EndpointCase, Frontend, Ground, Kind, NodePorts, NodeSide, Place, PortCase, Probe, Range, ServiceCase,
    Source, State, Transport, far_node, node_name, zone,
};
pub use generate::{Replay, Trial};
pub use model::{Answer, Verdict};
pub use objects::{Objects, describe};
pub use tracer::Tracer;
