//! Which addresses there are and in which order they are given: pure.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use oarlock_cni::types::IpConfig;

use super::config::RangeConfig;

/// Addresses `start` to `end` of a subnet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Range {
    subnet: IpNet,
    start: u128,
    end: u128,
    gateway: IpAddr,
}

/// Ranges of one family that one address is given from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RangeSet(Vec<Range>);

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u128::from(u32::from(address)),
        IpAddr::V6(address) => u128::from(address),
    }
}

fn address(number: u128, like: IpAddr) -> IpAddr {
    match like {
        // A range's numbers come from addresses of the same family, so they fit.
        IpAddr::V4(_) => Ipv4Addr::from(number as u32).into(),
        IpAddr::V6(_) => Ipv6Addr::from(number).into(),
    }
}

impl Range {
    pub fn new(config: &RangeConfig) -> Result<Range, String> {
        let subnet = config.subnet.ok_or("subnet is required")?;
        if subnet.addr() != subnet.network() {
            return Err(format!("subnet {subnet} has host bits set (did you mean {}?)", subnet.trunc()));
        }
        if subnet.max_prefix_len() - subnet.prefix_len() < 2 {
            return Err(format!("subnet {subnet} is too small"));
        }
        let inside = |name: &str, address: IpAddr| {
            if subnet.contains(&address) {
                Ok(address)
            } else {
                Err(format!("{name} {address} is not in subnet {subnet}"))
            }
        };
        let like = subnet.addr();
        let first = number(subnet.network()) + 1;
        let last = number(subnet.broadcast()) - u128::from(like.is_ipv4());
        let start = config.range_start.map(|address| inside("rangeStart", address)).transpose()?.map_or(first, number);
        let end = config.range_end.map(|address| inside("rangeEnd", address)).transpose()?.map_or(last, number);
        let (start, end) = (start.max(first), end.min(last));
        if start > end {
            return Err("rangeStart is after rangeEnd".to_owned());
        }
        let gateway = config.gateway.unwrap_or_else(|| address(first, like));
        Ok(Range { subnet, start, end, gateway })
    }

    fn contains(&self, address: IpAddr) -> bool {
        address.is_ipv4() == self.subnet.addr().is_ipv4() && (self.start..=self.end).contains(&number(address))
    }

    fn address(&self, number: u128) -> IpAddr {
        address(number, self.subnet.addr())
    }
}

impl RangeSet {
    pub fn new(ranges: Vec<Range>) -> Result<RangeSet, String> {
        let Some(first) = ranges.first() else { return Err("has no range".to_owned()) };
        if ranges.iter().any(|range| range.subnet.addr().is_ipv4() != first.subnet.addr().is_ipv4()) {
            return Err("mixes IPv4 and IPv6".to_owned());
        }
        Ok(RangeSet(ranges))
    }

    pub fn contains(&self, address: IpAddr) -> bool {
        self.0.iter().any(|range| range.contains(address))
    }

    pub fn is_gateway(&self, address: IpAddr) -> bool {
        self.0.iter().any(|range| range.gateway == address)
    }

    pub fn overlaps(&self, other: &RangeSet) -> bool {
        let meet = |a: &Range, b: &Range| {
            a.subnet.addr().is_ipv4() == b.subnet.addr().is_ipv4() && a.start <= b.end && b.start <= a.end
        };
        self.0.iter().any(|range| other.0.iter().any(|another| meet(range, another)))
    }

    /// Every address once, beginning after the one given last, without gateways.
    pub fn candidates(&self, last: Option<IpAddr>) -> impl Iterator<Item = IpAddr> + '_ {
        let at =
            last.and_then(|last| self.0.iter().position(|range| range.contains(last)).map(|at| (at, number(last))));
        let (at, after) = at.map_or((0, None), |(at, last)| (at, Some(last)));
        let whole = |range: &Range| range.start..=range.end;
        let rest = self.0.get(at).map(|range| after.map_or(range.start, |last| last + 1)..=range.end);
        let rest = rest.into_iter().flatten().map(move |number| (at, number));
        let others = (1..self.0.len()).map(move |step| (at + step) % self.0.len());
        let others = others.flat_map(move |index| whole(&self.0[index]).map(move |number| (index, number)));
        let before = after.into_iter().flat_map(move |last| (self.0[at].start..=last).map(move |number| (at, number)));
        rest.chain(others)
            .chain(before)
            .map(|(index, number)| self.0[index].address(number))
            .filter(|address| !self.is_gateway(*address))
    }

    /// The address as the result names it.
    pub fn ip_config(&self, address: IpAddr) -> Option<IpConfig> {
        let range = self.0.iter().find(|range| range.contains(address))?;
        Some(IpConfig::new(IpNet::new(address, range.subnet.prefix_len()).ok()?, Some(range.gateway)))
    }
}

impl fmt::Display for RangeSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let one = |range: &Range| format!("{}-{}", range.address(range.start), range.address(range.end));
        f.write_str(&self.0.iter().map(one).collect::<Vec<_>>().join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(subnet: &str, start: Option<&str>, end: Option<&str>) -> Result<Range, String> {
        let parse = |text: &str| text.parse().unwrap();
        Range::new(&RangeConfig {
            subnet: Some(subnet.parse().unwrap()),
            range_start: start.map(parse),
            range_end: end.map(parse),
            gateway: None,
        })
    }

    fn order(set: &RangeSet, last: Option<&str>) -> Vec<String> {
        set.candidates(last.map(|text| text.parse().unwrap())).map(|address| address.to_string()).collect()
    }

    #[test]
    fn network_gateway_and_broadcast_are_never_given() {
        let set = RangeSet::new(vec![range("10.42.0.0/29", None, None).unwrap()]).unwrap();
        assert_eq!(order(&set, None), ["10.42.0.2", "10.42.0.3", "10.42.0.4", "10.42.0.5", "10.42.0.6"]);
        assert_eq!(set.ip_config("10.42.0.2".parse().unwrap()).unwrap().gateway, Some("10.42.0.1".parse().unwrap()));
    }

    #[test]
    fn addresses_are_given_in_turn_across_the_ranges_of_a_set() {
        let set = RangeSet::new(vec![
            range("10.0.0.0/24", Some("10.0.0.10"), Some("10.0.0.11")).unwrap(),
            range("10.0.1.0/24", Some("10.0.1.20"), Some("10.0.1.21")).unwrap(),
        ])
        .unwrap();
        assert_eq!(order(&set, Some("10.0.0.10")), ["10.0.0.11", "10.0.1.20", "10.0.1.21", "10.0.0.10"]);
        assert_eq!(order(&set, Some("10.0.1.21")), ["10.0.0.10", "10.0.0.11", "10.0.1.20", "10.0.1.21"]);
        assert_eq!(order(&set, Some("192.168.0.1")).len(), 4);
    }

    #[test]
    fn ipv6_ranges_count_in_128_bits() {
        let set = RangeSet::new(vec![range("fd00::/64", None, Some("fd00::3")).unwrap()]).unwrap();
        assert_eq!(order(&set, None), ["fd00::2", "fd00::3"]);
    }

    #[test]
    fn bad_ranges_say_why() {
        assert!(range("10.0.0.1/24", None, None).unwrap_err().contains("did you mean 10.0.0.0/24"));
        assert!(range("10.0.0.0/31", None, None).unwrap_err().contains("too small"));
        assert!(range("10.0.0.0/24", Some("10.0.1.1"), None).unwrap_err().contains("not in subnet"));
        assert!(range("10.0.0.0/24", Some("10.0.0.9"), Some("10.0.0.3")).unwrap_err().contains("after"));
    }
}
