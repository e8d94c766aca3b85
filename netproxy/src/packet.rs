//! Where a packet has its addresses and ports, and comparing them, as nftables expressions. Pure.

use ipnet::IpNet;
use oarlock_nft::{Expr, Field, PayloadBase, Reg};

/// The IP header of one address family.
#[derive(Debug, Clone, Copy)]
pub struct Header {
    is_ipv4: bool,
}

impl Header {
    pub fn of(is_ipv4: bool) -> Self {
        Self { is_ipv4 }
    }

    pub fn is_ipv4(self) -> bool {
        self.is_ipv4
    }

    pub fn address(self) -> Field {
        if self.is_ipv4 { Field::Ipv4 } else { Field::Ipv6 }
    }

    /// Registers that an address takes.
    pub fn width(self) -> u8 {
        if self.is_ipv4 { 1 } else { 4 }
    }

    pub fn load_source(self, to: u8) -> Expr {
        let (offset, len_bytes) = if self.is_ipv4 { (12, 4) } else { (8, 16) };
        Expr::LoadPayload { base: PayloadBase::Network, offset, len_bytes, to: Reg(to) }
    }

    pub fn load_destination(self, to: u8) -> Expr {
        let (offset, len_bytes) = if self.is_ipv4 { (16, 4) } else { (24, 16) };
        Expr::LoadPayload { base: PayloadBase::Network, offset, len_bytes, to: Reg(to) }
    }
}

/// The destination port, which TCP, UDP and SCTP have in the same place.
pub fn load_port(to: u8) -> Expr {
    Expr::LoadPayload { base: PayloadBase::Transport, offset: 2, len_bytes: 2, to: Reg(to) }
}

/// Goes on when the address that `load` loads is in `net`, or is not.
pub fn in_net(load: Expr, net: IpNet, inside: bool) -> Vec<Expr> {
    let mask = oarlock_netlink::wire::address_bytes(net.netmask());
    let xor = vec![0; mask.len()];
    let value = oarlock_netlink::wire::address_bytes(net.network());
    vec![load, Expr::Bitwise { register: Reg(0), mask, xor }, Expr::Compare { register: Reg(0), equal: inside, value }]
}
