//! Answers of the upstream resolvers, kept for as long as they say, bounded in number.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use hickory_proto::op::{Message, Query, ResponseCode};
use hickory_proto::rr::{RData, RecordType};

const MAX_ENTRIES: usize = 10_000;
const MAX_TTL: Duration = Duration::from_secs(3600);
/// How long after its time an answer is still given when no resolver can be asked (RFC 8767), and what time it then gets.
const MAX_STALE: Duration = Duration::from_secs(24 * 3600);
const STALE_TTL_SECONDS: u32 = 30;
/// How long "no such name" is kept when the answer does not say.
const NEGATIVE_TTL_SECONDS: u32 = 30;

/// What a cached answer answers.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Question {
    name: String,
    kind: RecordType,
    dnssec: bool,
}

impl Question {
    pub fn new(query: &Query, dnssec: bool) -> Question {
        Question { name: query.name().to_lowercase().to_ascii(), kind: query.query_type(), dnssec }
    }
}

#[derive(Debug)]
struct Entry {
    answer: Message,
    since: Instant,
    until: Instant,
}

/// The cache.
#[derive(Debug, Default)]
pub struct Cache {
    entries: HashMap<Question, Entry>,
}

impl Cache {
    /// The answer, with times to live as they are now.
    pub fn get(&self, question: &Question, now: Instant) -> Option<Message> {
        let entry = self.entries.get(question).filter(|entry| now < entry.until)?;
        let mut answer = entry.answer.clone();
        let age = u32::try_from(now.duration_since(entry.since).as_secs()).unwrap_or(u32::MAX);
        for records in [&mut answer.answers, &mut answer.authorities, &mut answer.additionals] {
            records.iter_mut().for_each(|record| record.ttl = record.ttl.saturating_sub(age));
        }
        Some(answer)
    }

    /// The answer as it was, although its time is over: better than none.
    pub fn stale(&self, question: &Question, now: Instant) -> Option<Message> {
        let entry = self.entries.get(question).filter(|entry| now < entry.until + MAX_STALE)?;
        let mut answer = entry.answer.clone();
        for records in [&mut answer.answers, &mut answer.authorities, &mut answer.additionals] {
            records.iter_mut().for_each(|record| record.ttl = record.ttl.min(STALE_TTL_SECONDS));
        }
        Some(answer)
    }

    pub fn put(&mut self, question: Question, answer: &Message, now: Instant) {
        let Some(seconds) = lifetime_seconds(answer).filter(|seconds| *seconds > 0) else { return };
        // What is over goes first, and of the rest whatever comes: room is made for many at once, so that it is cheap.
        if self.entries.len() >= MAX_ENTRIES {
            self.entries.retain(|_, entry| now < entry.until);
        }
        if self.entries.len() >= MAX_ENTRIES {
            let mut kept = 0;
            self.entries.retain(|_, _| {
                kept += 1;
                kept <= MAX_ENTRIES / 2
            });
        }
        let until = now + Duration::from_secs(u64::from(seconds)).min(MAX_TTL);
        self.entries.insert(question, Entry { answer: answer.clone(), since: now, until });
    }
}

/// How long an answer may be kept; not at all when it is a failure or incomplete.
fn lifetime_seconds(answer: &Message) -> Option<u32> {
    if answer.metadata.truncation {
        return None;
    }
    let negative = || {
        answer.authorities.iter().find_map(|record| match &record.data {
            RData::SOA(soa) => Some(soa.minimum.min(record.ttl)),
            _ => None,
        })
    };
    match answer.metadata.response_code {
        ResponseCode::NoError if !answer.answers.is_empty() => answer.answers.iter().map(|record| record.ttl).min(),
        ResponseCode::NoError | ResponseCode::NXDomain => Some(negative().unwrap_or(NEGATIVE_TTL_SECONDS)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hickory_proto::op::OpCode;
    use hickory_proto::rr::rdata::A;
    use hickory_proto::rr::{Name, Record};

    fn answer(ttl: u32) -> (Question, Message) {
        let name = Name::from_ascii("Example.org.").unwrap();
        let query = Query::query(name.clone(), RecordType::A);
        let mut message = Message::response(1, OpCode::Query);
        message.add_answer(Record::from_rdata(name, ttl, RData::A(A([192, 0, 2, 1].into()))));
        (Question::new(&query, false), message)
    }

    #[test]
    fn an_answer_is_kept_for_its_time_and_grows_older() {
        let (mut cache, now) = (Cache::default(), Instant::now());
        let (question, message) = answer(10);
        cache.put(question.clone(), &message, now);
        assert_eq!(cache.get(&question, now + Duration::from_secs(4)).unwrap().answers[0].ttl, 6);
        assert!(cache.get(&question, now + Duration::from_secs(10)).is_none());
    }

    #[test]
    fn an_answer_that_is_over_is_there_for_when_nobody_can_be_asked() {
        let (mut cache, now) = (Cache::default(), Instant::now());
        let (question, message) = answer(60);
        cache.put(question.clone(), &message, now);
        let later = now + Duration::from_secs(3600);
        assert!(cache.get(&question, later).is_none());
        assert_eq!(cache.stale(&question, later).unwrap().answers[0].ttl, STALE_TTL_SECONDS);
        assert!(cache.stale(&question, later + MAX_STALE).is_none());
    }

    #[test]
    fn failures_are_not_kept() {
        let (mut cache, now) = (Cache::default(), Instant::now());
        let (question, mut message) = answer(10);
        message.metadata.response_code = ResponseCode::ServFail;
        cache.put(question.clone(), &message, now);
        assert!(cache.get(&question, now).is_none());
    }
}
