//! ARP and NDP as Ethernet frames: questions read, answers and announcements written. Pure.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use oarlock_netlink::Mac;

const ETHERNET_BYTES: usize = 14;
const BROADCAST: Mac = Mac([0xff; 6]);
const ARP: [u8; 2] = [0x08, 0x06];
const IPV6: [u8; 2] = [0x86, 0xdd];
const ARP_REQUEST: u8 = 1;
const ARP_REPLY: u8 = 2;
const ARP_BYTES: usize = 28;
const IPV6_HEADER_BYTES: usize = 40;
const ICMPV6: u8 = 58;
const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;
const SOLICITED: u8 = 0x40;
const OVERRIDE: u8 = 0x20;
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// Somebody asks who has an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Question {
    pub target: IpAddr,
    asker_mac: Mac,
    asker: IpAddr,
}

/// The question in a frame that came to `own`, if it is one.
pub fn read(frame: &[u8], own: Mac) -> Option<Question> {
    let (ethernet, rest) = frame.split_at_checked(ETHERNET_BYTES)?;
    let to = Mac(*ethernet.first_chunk()?);
    // In promiscuous mode also what is for others arrives.
    let is_for_us = to == own || to.0[0] & 1 == 1;
    match *ethernet.last_chunk::<2>()? {
        _ if !is_for_us => None,
        ARP => read_arp(rest),
        IPV6 => read_solicitation(rest, Mac(*ethernet[6..].first_chunk()?)),
        _ => None,
    }
}

fn read_arp(packet: &[u8]) -> Option<Question> {
    let packet = packet.get(..ARP_BYTES)?;
    // Ethernet and IPv4, with addresses of their lengths, and a request.
    if packet[..8] != [0, 1, 8, 0, 6, 4, 0, ARP_REQUEST] {
        return None;
    }
    let address = |at: usize| packet[at..].first_chunk::<4>().map(|bytes| Ipv4Addr::from(*bytes));
    let (asker, target) = (address(14)?, address(24)?);
    // Who asks for its own address announces it.
    (asker != target).then_some(Question {
        target: target.into(),
        asker_mac: Mac(*packet[8..].first_chunk()?),
        asker: asker.into(),
    })
}

fn read_solicitation(packet: &[u8], asker_mac: Mac) -> Option<Question> {
    const HOP_LIMIT: usize = 7;
    let (header, icmp) = packet.split_at_checked(IPV6_HEADER_BYTES)?;
    let length = usize::from(u16::from_be_bytes([header[4], header[5]]));
    let icmp = icmp.get(..length).filter(|icmp| icmp.len() >= 24)?;
    // A lower hop limit means that it was forwarded, which no neighbour's is.
    if header[6] != ICMPV6 || header[HOP_LIMIT] != 255 || icmp[..2] != [SOLICITATION, 0] {
        return None;
    }
    let (source, destination) = (header[8..].first_chunk::<16>()?, header[24..].first_chunk::<16>()?);
    if checksum(source, destination, icmp) != 0 {
        return None;
    }
    let target = Ipv6Addr::from(*icmp[8..].first_chunk::<16>()?);
    Some(Question { target: target.into(), asker_mac, asker: Ipv6Addr::from(*source).into() })
}

/// The answer that `own` has what was asked for.
pub fn answer(question: &Question, own: Mac) -> Option<Vec<u8>> {
    match (question.target, question.asker) {
        (IpAddr::V4(target), IpAddr::V4(asker)) => {
            Some(arp(ARP_REPLY, own, target, question.asker_mac, asker, question.asker_mac))
        }
        // Whoever asks without an address looks for duplicates, and is told together with all others.
        (IpAddr::V6(target), IpAddr::V6(Ipv6Addr::UNSPECIFIED)) => Some(advertisement(own, target, None)),
        (IpAddr::V6(target), IpAddr::V6(asker)) => Some(advertisement(own, target, Some((asker, question.asker_mac)))),
        _ => None,
    }
}

/// What tells the segment unasked that `own` has an address. ARP in both forms, because some listen only to one.
pub fn announcement(address: IpAddr, own: Mac) -> Vec<Vec<u8>> {
    match address {
        IpAddr::V4(address) => vec![
            arp(ARP_REQUEST, own, address, BROADCAST, address, Mac([0; 6])),
            arp(ARP_REPLY, own, address, BROADCAST, address, BROADCAST),
        ],
        IpAddr::V6(address) => vec![advertisement(own, address, None)],
    }
}

/// The group that questions for an IPv6 address go to.
pub fn solicited_group(address: Ipv6Addr) -> Ipv6Addr {
    let [.., a, b] = address.segments();
    Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | (a & 0xff), b)
}

fn ethernet(to: Mac, from: Mac, kind: [u8; 2]) -> Vec<u8> {
    [&to.0[..], &from.0, &kind].concat()
}

fn arp(operation: u8, own: Mac, address: Ipv4Addr, to: Mac, target: Ipv4Addr, target_mac: Mac) -> Vec<u8> {
    let mut frame = ethernet(to, own, ARP);
    frame.extend([0, 1, 8, 0, 6, 4, 0, operation]);
    frame.extend([&own.0[..], &address.octets(), &target_mac.0, &target.octets()].concat());
    frame
}

/// A neighbour advertisement, as an answer to one or to all.
fn advertisement(own: Mac, address: Ipv6Addr, to: Option<(Ipv6Addr, Mac)>) -> Vec<u8> {
    const TARGET_LINK_ADDRESS: u8 = 2;
    let (destination, destination_mac) = to.unwrap_or((ALL_NODES, Mac([0x33, 0x33, 0, 0, 0, 1])));
    let flags = OVERRIDE | if to.is_some() { SOLICITED } else { 0 };
    let mut icmp = vec![ADVERTISEMENT, 0, 0, 0, flags, 0, 0, 0];
    icmp.extend(address.octets());
    icmp.extend([TARGET_LINK_ADDRESS, 1]);
    icmp.extend(own.0);
    let sum = checksum(&address.octets(), &destination.octets(), &icmp);
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
    let mut frame = ethernet(destination_mac, own, IPV6);
    frame.extend([0x60, 0, 0, 0, 0, icmp.len() as u8, ICMPV6, 255]);
    frame.extend(address.octets());
    frame.extend(destination.octets());
    frame.extend(icmp);
    frame
}

/// The checksum of an ICMPv6 message, zero for one that has the right one already.
fn checksum(source: &[u8; 16], destination: &[u8; 16], icmp: &[u8]) -> u16 {
    let words = |bytes: &[u8]| -> u32 {
        bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0))).sum()
    };
    let mut sum = words(source) + words(destination) + icmp.len() as u32 + u32::from(ICMPV6) + words(icmp);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const OWN: Mac = Mac([2, 0, 0, 0, 0, 1]);
    const OTHER: Mac = Mac([2, 0, 0, 0, 0, 2]);

    fn solicitation(from: Ipv6Addr, target: Ipv6Addr) -> Vec<u8> {
        let mut icmp = vec![SOLICITATION, 0, 0, 0, 0, 0, 0, 0];
        icmp.extend(target.octets());
        let group = solicited_group(target);
        let sum = checksum(&from.octets(), &group.octets(), &icmp);
        icmp[2..4].copy_from_slice(&sum.to_be_bytes());
        let mut frame = ethernet(Mac([0x33, 0x33, 0xff, 0, 0, 9]), OTHER, IPV6);
        frame.extend([0x60, 0, 0, 0, 0, icmp.len() as u8, ICMPV6, 255]);
        frame.extend([&from.octets()[..], &group.octets(), &icmp].concat());
        frame
    }

    #[test]
    fn an_arp_request_is_answered_to_who_asked() {
        let (asker, target) = (Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::new(192, 0, 2, 9));
        let request = arp(ARP_REQUEST, OTHER, asker, BROADCAST, target, Mac([0; 6]));
        let question = read(&request, OWN).unwrap();
        assert_eq!(question.target, IpAddr::from(target));
        let reply = answer(&question, OWN).unwrap();
        assert_eq!((&reply[..6], &reply[6..12]), (&OTHER.0[..], &OWN.0[..]));
        assert_eq!((reply[21], &reply[22..28], &reply[28..32]), (ARP_REPLY, &OWN.0[..], &target.octets()[..]));
        assert_eq!(read(&reply, OTHER), None, "an answer is no question");
        assert!(announcement(target.into(), OTHER).iter().all(|frame| read(frame, OWN).is_none()));
    }

    #[test]
    fn a_solicitation_is_answered_to_who_asked_or_to_all() {
        let (asker, target): (Ipv6Addr, Ipv6Addr) = ("fe80::2".parse().unwrap(), "2001:db8::9".parse().unwrap());
        let question = read(&solicitation(asker, target), OWN).unwrap();
        let reply = answer(&question, OWN).unwrap();
        assert_eq!(reply[..6], OTHER.0);
        let (source, destination) = (reply[22..].first_chunk().unwrap(), reply[38..].first_chunk().unwrap());
        assert_eq!((checksum(source, destination, &reply[54..]), reply[58]), (0, SOLICITED | OVERRIDE));
        assert_eq!((*source, *destination), (target.octets(), asker.octets()));
        assert_eq!(reply[80..86], OWN.0);
        let duplicate = read(&solicitation(Ipv6Addr::UNSPECIFIED, target), OWN).unwrap();
        assert_eq!(answer(&duplicate, OWN).unwrap()[58], OVERRIDE);
    }

    #[test]
    fn what_was_forwarded_damaged_or_is_for_others_is_no_question() {
        let whole = solicitation("fe80::2".parse().unwrap(), "2001:db8::9".parse().unwrap());
        let with = |at: usize, value: u8| {
            let mut frame = whole.clone();
            frame[at] = value;
            read(&frame, OWN)
        };
        assert!(with(21, 255).is_some());
        assert_eq!(with(21, 254), None, "hop limit");
        assert_eq!(with(70, 7), None, "checksum");
        assert_eq!(with(0, 0x02), None, "another's frame");
        assert_eq!(read(&whole[..60], OWN), None);
    }

    proptest! {
        #[test]
        fn no_frame_makes_it_panic(frame in proptest::collection::vec(any::<u8>(), 0..120), arp in any::<bool>()) {
            let mut frame = frame;
            if frame.len() > 14 {
                frame[0] = 0xff;
                frame[12..14].copy_from_slice(if arp { &ARP } else { &IPV6 });
            }
            let _ = read(&frame, OWN);
        }
    }
}
