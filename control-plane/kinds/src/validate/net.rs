//! Addresses and networks.

use super::Errors;
use std::net::IpAddr;

/// A canonical address.
pub(super) fn ip(errors: &mut Errors, path: &str, value: &str) -> Option<IpAddr> {
    let Ok(address) = value.parse::<IpAddr>() else {
        errors.invalid(path, value, "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)");
        return None;
    };
    if let IpAddr::V6(v6) = address
        && v6.to_ipv4_mapped().is_some()
    {
        errors.invalid(path, value, "must not be an IPv4-mapped IPv6 address");
        return None;
    }
    Some(address)
}

/// An address that packets can be sent to.
pub(super) fn not_special(errors: &mut Errors, path: &str, value: &str) {
    let Some(address) = ip(errors, path, value) else { return };
    if address.is_unspecified() {
        errors.invalid(path, value, format!("may not be unspecified ({value})"));
    }
    if address.is_loopback() {
        errors.invalid(path, value, "may not be in the loopback range (127.0.0.0/8, ::1/128)");
    }
    let (link_local, multicast) = match address {
        IpAddr::V4(v4) => (v4.is_link_local(), v4.octets()[..3] == [224, 0, 0]),
        IpAddr::V6(v6) => (v6.is_unicast_link_local(), v6.segments()[0] & 0xff0f == 0xff02),
    };
    if link_local {
        errors.invalid(path, value, "may not be in the link-local range (169.254.0.0/16, fe80::/10)");
    }
    if multicast {
        errors.invalid(path, value, "may not be in the link-local multicast range (224.0.0.0/24, ff02::/10)");
    }
}

pub(super) fn cidr(errors: &mut Errors, path: &str, value: &str) {
    match value.parse::<ipnet::IpNet>() {
        Err(_) => errors.invalid(path, value, "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)"),
        Ok(network) if network != network.trunc() => {
            errors.invalid(path, value, "must not have bits set beyond the prefix length");
        }
        Ok(_) => {}
    }
}
