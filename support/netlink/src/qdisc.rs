//! Queueing disciplines that limit the rate of a link, in both directions.

use crate::Result;
use crate::connection::Connection;
use crate::error::gone_is_fine;
use crate::wire::{Received, Writer, attribute, attributes, flags, read_string, read_u32};

const NEW_QDISC: u16 = 36;
const DELETE_QDISC: u16 = 37;
const GET_QDISC: u16 = 38;
const NEW_FILTER: u16 = 44;
const GET_FILTER: u16 = 46;
const U32_ACTION: u16 = 7;
const FIRST_ACTION: u16 = 1;
const ACTION_OPTIONS: u16 = 2;
const MIRRED_PARAMETERS: u16 = 2;
const ROOT: u32 = 0xffff_ffff;
const INGRESS_PARENT: u32 = 0xffff_fff1;
const INGRESS_HANDLE: u32 = 0xffff_0000;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TBF_PARAMETERS: u16 = 1;
const TBF_RATE64: u16 = 4;
const TBF_BURST: u16 = 6;
const HEADER_BYTES: usize = 20;
/// Sizes of packets are those on the wire.
const ETHERNET: u8 = 1;

/// A token bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenBucket {
    pub bytes_per_second: u64,
    pub burst_bytes: u32,
    /// How much may wait for tokens.
    pub limit_bytes: u32,
}

fn header(w: &mut Writer, link: u32, handle: u32, parent: u32, info: u32) {
    w.raw(&[0; 4]);
    for value in [link, handle, parent, info] {
        w.raw(&value.to_ne_bytes());
    }
}

impl Connection {
    /// Limits what leaves through a link, in the place of any other such limit.
    pub fn set_token_bucket(&mut self, link: u32, bucket: &TokenBucket) -> Result<()> {
        const HANDLE: u32 = 1 << 16;
        self.request("limit the rate of a link", NEW_QDISC, flags::CREATE | flags::REPLACE, |w| {
            header(w, link, HANDLE, ROOT, 0);
            w.string(TCA_KIND, "tbf");
            w.nest(TCA_OPTIONS, |w| {
                let short = u32::try_from(bucket.bytes_per_second).unwrap_or(u32::MAX);
                let mut parameters = [0; 36];
                parameters[1] = ETHERNET;
                parameters[8..12].copy_from_slice(&short.to_ne_bytes());
                parameters[24..28].copy_from_slice(&bucket.limit_bytes.to_ne_bytes());
                w.attribute(TBF_PARAMETERS, &parameters);
                w.u32(TBF_BURST, bucket.burst_bytes);
                if short == u32::MAX {
                    w.attribute(TBF_RATE64, &bucket.bytes_per_second.to_ne_bytes());
                }
            });
        })
    }

    /// The rate in bytes each second that what leaves through a link is limited to, if it is.
    pub fn token_bucket_rate(&mut self, link: u32) -> Result<Option<u64>> {
        let mut found = None;
        self.query(
            "list rate limits",
            GET_QDISC,
            flags::DUMP,
            |w| header(w, 0, 0, 0, 0),
            |message| found = found.or_else(|| rate_of(&message, link)),
        )?;
        Ok(found)
    }

    /// Takes the limit of a link away; none is fine.
    pub fn remove_token_bucket(&mut self, link: u32) -> Result<()> {
        if self.token_bucket_rate(link)?.is_none() {
            return Ok(());
        }
        gone_is_fine(self.request("remove a rate limit", DELETE_QDISC, 0, |w| header(w, link, 0, ROOT, 0)))
    }

    /// Makes an intermediate link that what comes in elsewhere can leave through, up.
    pub fn create_ifb(&mut self, name: &str, mtu: u32) -> Result<()> {
        self.create_plain_link(name, "ifb", mtu)
    }

    /// Leads all that comes in through a link to another one to leave there.
    pub fn redirect_ingress(&mut self, link: u32, target: u32) -> Result<()> {
        const ANY_PROTOCOL: u32 = 0x0300;
        const PRIORITY: u32 = 1;
        let made = self.request("open the way in of a link", NEW_QDISC, flags::CREATE | flags::EXCL, |w| {
            header(w, link, INGRESS_HANDLE, INGRESS_PARENT, 0);
            w.string(TCA_KIND, "ingress");
        });
        match made {
            Err(error) if !error.is_exists() => return Err(error),
            _ => {}
        }
        self.request("redirect what comes in through a link", NEW_FILTER, flags::CREATE | flags::REPLACE, |w| {
            header(w, link, 0, INGRESS_HANDLE, PRIORITY << 16 | ANY_PROTOCOL);
            w.string(TCA_KIND, "u32");
            w.nest(TCA_OPTIONS, |w| write_match_all(w, target));
        })
    }
}

impl Connection {
    /// The links that [`Connection::redirect_ingress`] leads to, from any link of the namespace.
    pub fn redirect_targets(&mut self) -> Result<Vec<u32>> {
        let mut open = Vec::new();
        self.query(
            "list the ways in of links",
            GET_QDISC,
            flags::DUMP,
            |w| header(w, 0, 0, 0, 0),
            |message| open.extend(ingress_of(&message)),
        )?;
        let mut targets = Vec::new();
        for link in open {
            self.query(
                "list redirections",
                GET_FILTER,
                flags::DUMP,
                |w| header(w, link, 0, INGRESS_HANDLE, 0),
                |message| targets.extend(target_of(&message)),
            )?;
        }
        Ok(targets)
    }
}

/// The link of an ingress discipline.
fn ingress_of(message: &Received<'_>) -> Option<u32> {
    let (header, rest) = message.payload.split_at_checked(HEADER_BYTES)?;
    let is_ingress = message.kind == NEW_QDISC && read_string(attribute(rest, TCA_KIND)?) == "ingress";
    is_ingress.then(|| read_u32(&header[4..])).flatten()
}

/// The link that a filter redirects to.
fn target_of(message: &Received<'_>) -> Option<u32> {
    let rest = message.payload.get(HEADER_BYTES..)?;
    let options = attribute(rest, TCA_OPTIONS).filter(|_| message.kind == NEW_FILTER)?;
    let action = attribute(attribute(options, U32_ACTION)?, FIRST_ACTION)?;
    let parameters = attribute(attribute(action, ACTION_OPTIONS)?, MIRRED_PARAMETERS)?;
    read_u32(parameters.get(24..)?)
}

/// A selector that fits every packet, with the action that sends it out of another link.
fn write_match_all(w: &mut Writer, target: u32) {
    const U32_CLASS: u16 = 1;
    const U32_SELECTOR: u16 = 5;
    const ACTION_KIND: u16 = 1;
    const STOLEN: u32 = 4;
    const EGRESS_REDIRECT: u32 = 1;
    w.u32(U32_CLASS, 1 << 16 | 1);
    // One key: no bit of the first word matters. The first byte says that the match decides.
    let mut selector = [0; 16 + 16];
    selector[0] = 1;
    selector[2] = 1;
    w.attribute(U32_SELECTOR, &selector);
    w.nest(U32_ACTION, |w| {
        w.nest(FIRST_ACTION, |w| {
            w.string(ACTION_KIND, "mirred");
            w.nest(ACTION_OPTIONS, |w| {
                let mut parameters = Vec::new();
                for value in [0, 0, STOLEN, 0, 0, EGRESS_REDIRECT, target] {
                    parameters.extend(u32::to_ne_bytes(value));
                }
                w.attribute(MIRRED_PARAMETERS, &parameters);
            });
        });
    });
}

fn rate_of(message: &Received<'_>, link: u32) -> Option<u64> {
    let (header, rest) = message.payload.split_at_checked(HEADER_BYTES)?;
    if message.kind != NEW_QDISC || read_u32(&header[4..])? != link || read_u32(&header[12..])? != ROOT {
        return None;
    }
    let mut kinds = attributes(rest).filter(|(kind, _)| *kind == TCA_KIND);
    if read_string(kinds.next()?.1) != "tbf" {
        return None;
    }
    let options = attribute(rest, TCA_OPTIONS)?;
    let long = attribute(options, TBF_RATE64).and_then(|bytes| Some(u64::from_ne_bytes(bytes.try_into().ok()?)));
    long.or_else(|| Some(u64::from(read_u32(attribute(options, TBF_PARAMETERS)?.get(8..)?)?)))
}
