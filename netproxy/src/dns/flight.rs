//! Questions that are being asked of resolvers: equal ones are asked once, and all who ask get what comes.

use std::collections::HashMap;
use std::sync::Arc;

use hickory_proto::op::Message;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::Instant;

use super::cache::Question;
use super::upstream::UpstreamError;

/// What became of a question.
pub type Outcome = Result<Message, Arc<UpstreamError>>;

/// A question under way, for one who waits for it.
#[derive(Debug, Clone)]
pub struct Flight {
    pub since: Instant,
    outcome: watch::Receiver<Option<Outcome>>,
}

impl Flight {
    /// Waits for what becomes of the question. Cancel safe.
    pub async fn outcome(&mut self) -> Outcome {
        match self.outcome.wait_for(Option::is_some).await {
            Ok(outcome) => outcome.clone().unwrap_or_else(|| Err(Arc::new(UpstreamError::Busy))),
            // Only when everything ends.
            Err(_) => Err(Arc::new(UpstreamError::Busy)),
        }
    }
}

/// The other end of a [`Flight`].
#[derive(Debug)]
pub struct Landing(watch::Sender<Option<Outcome>>);

/// All questions under way.
#[derive(Debug, Default)]
pub struct Flights {
    under_way: Mutex<HashMap<Question, Flight>>,
}

impl Flights {
    /// The question under way, or a new one if `start` can begin it.
    pub fn join(&self, question: &Question, start: impl FnOnce(Landing) -> Option<()>) -> Option<Flight> {
        let mut under_way = self.under_way.lock();
        // Nobody lands one whose task came to grief.
        if let Some(flight) = under_way.get(question).filter(|flight| flight.outcome.has_changed().is_ok()) {
            return Some(flight.clone());
        }
        let (sender, outcome) = watch::channel(None);
        start(Landing(sender))?;
        let flight = Flight { since: Instant::now(), outcome };
        under_way.insert(question.clone(), flight.clone());
        Some(flight)
    }

    /// Tells all who wait; `keep` before that, unless the question was abandoned meanwhile.
    pub fn land(&self, landing: Landing, question: &Question, outcome: Outcome, keep: impl FnOnce(&Outcome)) {
        let mut under_way = self.under_way.lock();
        if under_way.get(question).is_some_and(|flight| landing.0.subscribe().same_channel(&flight.outcome)) {
            keep(&outcome);
            under_way.remove(question);
        }
        drop(under_way);
        landing.0.send_replace(Some(outcome));
    }

    /// Those who ask from now on ask anew.
    pub fn abandon(&self) {
        self.under_way.lock().clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hickory_proto::op::{OpCode, Query};
    use hickory_proto::rr::{Name, RecordType};

    fn question(text: &str) -> Question {
        Question::new(&Query::query(Name::from_ascii(text).unwrap(), RecordType::A), false)
    }

    #[tokio::test(start_paused = true)]
    async fn equal_questions_share_an_outcome() {
        let flights = Flights::default();
        let mut landing = None;
        let flight = |text: &str, landing: &mut Option<Landing>| {
            flights.join(&question(text), |one| {
                *landing = Some(one);
                Some(())
            })
        };
        let mut first = flight("a.example.", &mut landing).unwrap();
        let began = landing.take().expect("asked");
        let mut second = flight("A.Example.", &mut landing).unwrap();
        assert!(landing.is_none(), "joined");
        flight("b.example.", &mut landing).unwrap();
        assert!(landing.take().is_some(), "another");
        let answer = Message::response(7, OpCode::Query);
        let mut kept = false;
        flights.land(began, &question("a.example."), Ok(answer), |_| kept = true);
        assert_eq!((first.outcome().await.unwrap().metadata.id, second.outcome().await.unwrap().metadata.id), (7, 7));
        assert!(kept);
        assert!(flight("b.example.", &mut None).is_some(), "its task is gone, and another began");
        assert!(flights.join(&question("a.example."), |_| None).is_none(), "it is over");
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_abandoned_is_told_and_not_kept() {
        let flights = Flights::default();
        let mut landing = None;
        let mut flight = flights.join(&question("a.example."), |one| {
            landing = Some(one);
            Some(())
        });
        flights.abandon();
        let answer = Message::response(7, OpCode::Query);
        flights.land(landing.unwrap(), &question("a.example."), Ok(answer), |_| panic!("kept"));
        assert!(flight.as_mut().unwrap().outcome().await.is_ok());
    }
}
