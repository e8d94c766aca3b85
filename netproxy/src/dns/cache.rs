//! Answers of the upstream resolvers, kept for as long as they say, bounded in number and in what they take.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use hickory_proto::op::{Message, Query, ResponseCode};
use hickory_proto::rr::{RData, Record, RecordType};

const MAX_ENTRIES: usize = 10_000;
/// All entries together, about as they are in memory: large answers are kept in smaller numbers.
const MAX_BYTES: usize = 16 << 20;
const MAX_TTL: Duration = Duration::from_secs(3600);
/// How long after its time an answer is still given when no resolver can be asked (RFC 8767), and what time it then gets.
const MAX_STALE: Duration = Duration::from_secs(24 * 3600);
const MAX_STALE_DENIAL: Duration = Duration::from_secs(60);
const STALE_TTL_SECONDS: u32 = 30;
/// How long nobody is asked again after all resolvers failed, as long as there is an answer from before (RFC 8767).
const RECHECK: Duration = Duration::from_secs(30);

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
    /// When resolvers were last asked in vain for a newer one.
    failed: Option<Instant>,
    size_bytes: usize,
}

/// The cache.
#[derive(Debug, Default)]
pub struct Cache {
    entries: HashMap<Question, Entry>,
    size_bytes: usize,
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

    /// The answer as it was, where asking for a newer one has just failed.
    pub fn stale_for_now(&self, question: &Question, now: Instant) -> Option<Message> {
        let failed = self.entries.get(question)?.failed?;
        if now < failed + RECHECK { self.stale(question, now) } else { None }
    }

    /// Takes note that resolvers were asked in vain.
    pub fn note_failure(&mut self, question: &Question, now: Instant) {
        if let Some(entry) = self.entries.get_mut(question) {
            entry.failed = Some(now);
        }
    }

    /// The answer as it was, although its time is over: better than none. That there is nothing of the name is no such answer for
    /// long, since there may be something by now.
    pub fn stale(&self, question: &Question, now: Instant) -> Option<Message> {
        let entry = self.entries.get(question)?;
        let bound = if entry.answer.answers.is_empty() { MAX_STALE_DENIAL } else { MAX_STALE };
        if now >= entry.until + bound {
            return None;
        }
        let mut answer = entry.answer.clone();
        for records in [&mut answer.answers, &mut answer.authorities, &mut answer.additionals] {
            records.iter_mut().for_each(|record| record.ttl = record.ttl.min(STALE_TTL_SECONDS));
        }
        Some(answer)
    }

    pub fn put(&mut self, question: Question, answer: &Message, now: Instant) {
        let Some(seconds) = lifetime_seconds(answer, question.kind).filter(|seconds| *seconds > 0) else { return };
        let Some(size_bytes) = size_bytes(&question, answer) else { return };
        if let Some(former) = self.entries.remove(&question) {
            self.size_bytes -= former.size_bytes;
        }
        // What is over goes first, and of the rest whatever comes: room is made for many at once, so that it is cheap.
        if !self.has_room(size_bytes) {
            self.retain(|entry, _, _| now < entry.until);
        }
        if !self.has_room(size_bytes) {
            self.retain(|_, count, bytes| count <= MAX_ENTRIES / 2 && bytes <= MAX_BYTES / 2);
        }
        let until = now + Duration::from_secs(u64::from(seconds)).min(MAX_TTL);
        self.size_bytes += size_bytes;
        self.entries.insert(question, Entry { answer: answer.clone(), since: now, until, failed: None, size_bytes });
    }

    fn has_room(&self, size_bytes: usize) -> bool {
        self.entries.len() < MAX_ENTRIES && self.size_bytes + size_bytes <= MAX_BYTES
    }

    /// Keeps entries of which `keeps` says yes, told how many and how many bytes are kept with this one.
    fn retain(&mut self, keeps: impl Fn(&Entry, usize, usize) -> bool) {
        let (mut count, mut bytes) = (0, 0);
        self.entries.retain(|_, entry| {
            let kept = keeps(entry, count + 1, bytes + entry.size_bytes);
            if kept {
                (count, bytes) = (count + 1, bytes + entry.size_bytes);
            }
            kept
        });
        self.size_bytes = bytes;
    }
}

/// What an entry takes at most: what its answer is on the wire, and beside that each record with its name, whole, and once
/// more for one in its data. Nothing for what cannot be written.
fn size_bytes(question: &Question, answer: &Message) -> Option<usize> {
    let records = answer.answers.iter().chain(&answer.authorities).chain(&answer.additionals);
    let records: usize = records.map(|record| size_of::<Record>() + 2 * record.name.len()).sum();
    let fixed = size_of::<Question>() + size_of::<Entry>() + records;
    Some(fixed + question.name.len() + answer.to_vec().ok()?.len())
}

/// How long an answer may be kept; not at all when it is a failure or incomplete, or when it denies something and does not say
/// for how long (RFC 2308, section 5).
fn lifetime_seconds(answer: &Message, kind: RecordType) -> Option<u32> {
    if answer.metadata.truncation {
        return None;
    }
    let negative = || {
        answer.authorities.iter().find_map(|record| match &record.data {
            RData::SOA(soa) => Some(soa.minimum.min(record.ttl)),
            _ => None,
        })
    };
    let positive = answer.answers.iter().map(|record| record.ttl).min();
    // Names that lead to others may end at one that does not exist, or has nothing of that type.
    let has_kind = |record: &Record| kind == RecordType::ANY || record.record_type() == kind;
    match answer.metadata.response_code {
        ResponseCode::NoError if answer.answers.iter().any(has_kind) => positive,
        ResponseCode::NoError | ResponseCode::NXDomain => {
            negative().map(|seconds| positive.map_or(seconds, |positive| positive.min(seconds)))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hickory_proto::op::OpCode;
    use hickory_proto::rr::Name;
    use hickory_proto::rr::rdata::{A, CNAME, SOA};

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
    fn large_answers_are_kept_in_smaller_numbers() {
        let (mut cache, now) = (Cache::default(), Instant::now());
        let (_, mut large) = answer(600);
        let record = large.answers[0].clone();
        large.add_answers(std::iter::repeat_n(record, 1500));
        let question = |number: usize| {
            let name = Name::from_ascii(format!("n{number}.example.org.")).unwrap();
            Question::new(&Query::query(name, RecordType::A), false)
        };
        let each = size_bytes(&question(1000), &large).unwrap();
        for number in 1000..1000 + 2 * MAX_BYTES / each {
            cache.put(question(number), &large, now);
            cache.put(question(number), &large, now);
            assert!(cache.get(&question(number), now).is_some(), "the newest is there");
            let sum: usize = cache.entries.values().map(|entry| entry.size_bytes).sum();
            assert_eq!((cache.size_bytes, sum <= MAX_BYTES), (sum, true));
        }
        assert!(cache.entries.len() > MAX_BYTES / each / 3, "not more goes than has to");
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
        // There may be something of the name by now.
        cache.entries.get_mut(&question).unwrap().answer.answers.clear();
        assert!(cache.stale(&question, now + Duration::from_secs(60) + MAX_STALE_DENIAL / 2).is_some());
        assert!(cache.stale(&question, later).is_none());
    }

    #[test]
    fn failures_are_not_kept() {
        let (mut cache, now) = (Cache::default(), Instant::now());
        let (question, mut message) = answer(10);
        message.metadata.response_code = ResponseCode::ServFail;
        cache.put(question.clone(), &message, now);
        assert!(cache.get(&question, now).is_none());
    }

    #[test]
    fn what_is_denied_is_kept_for_as_long_as_the_zone_says_and_not_at_all_when_it_does_not() {
        let (mut cache, now) = (Cache::default(), Instant::now());
        let (question, answered) = answer(600);
        let name = answered.answers[0].name.clone();
        let soa = RData::SOA(SOA::new(name.clone(), name.clone(), 1, 2, 3, 4, 20));
        let soa = Record::from_rdata(name.clone(), 60, soa);
        let alias = Record::from_rdata(name.clone(), 10, RData::CNAME(CNAME(name)));
        for code in [ResponseCode::NXDomain, ResponseCode::NoError] {
            let mut denied = Message::response(1, OpCode::Query);
            denied.metadata.response_code = code;
            cache.put(question.clone(), &denied, now);
            assert!(cache.get(&question, now).is_none(), "{code} without SOA");
            denied.add_authority(soa.clone());
            for (seconds, with_alias) in [(20, false), (10, true)] {
                let mut denied = denied.clone();
                denied.add_answers(with_alias.then(|| alias.clone()));
                cache.put(question.clone(), &denied, now);
                let at = |seconds| cache.get(&question, now + Duration::from_secs(seconds));
                assert!(at(seconds - 1).is_some() && at(seconds).is_none(), "{code}, alias: {with_alias}");
            }
            cache = Cache::default();
        }
    }

    #[test]
    fn resolvers_that_failed_are_left_alone_while_there_is_an_old_answer() {
        let (mut cache, now) = (Cache::default(), Instant::now());
        let (question, message) = answer(10);
        cache.put(question.clone(), &message, now);
        let later = now + Duration::from_secs(60);
        assert!(cache.stale_for_now(&question, later).is_none(), "nobody was asked");
        cache.note_failure(&question, later);
        assert!(cache.stale_for_now(&question, later + RECHECK - Duration::from_secs(1)).is_some());
        assert!(cache.stale_for_now(&question, later + RECHECK).is_none());
        cache.put(question.clone(), &message, later);
        assert!(cache.stale_for_now(&question, later).is_none(), "the answer is new");
    }
}
