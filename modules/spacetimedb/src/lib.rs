//! What a SpacetimeDB database needs to take events from Pillarbox: one table and one function.
//!
//! Built twice from this source: as `v1` for servers 1.x and as `v2` for servers 2.x, whose table attribute is spelled
//! differently and which have procedures. To take it into a module of your own, copy this file's table, enum and functions.

use spacetimedb::{reducer, ReducerContext, SpacetimeType, Table};
#[cfg(feature = "v2")]
use spacetimedb::{procedure, ProcedureContext};

/// What `scope_id` identifies.
#[derive(SpacetimeType, Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScopeKind {
    Site,
    Module,
    User,
    Profile,
}

/// One thing that happened. Private: only the owner of the database reads it; add `public` to let every client.
#[cfg_attr(
    feature = "v1",
    spacetimedb::table(name = tracking_event, index(name = by_time, btree(columns = [occurred_at_micros])))
)]
#[cfg_attr(
    feature = "v2",
    spacetimedb::table(accessor = tracking_event, index(accessor = by_time, btree(columns = [occurred_at_micros])))
)]
#[derive(Clone, Debug)]
pub struct TrackingEvent {
    #[primary_key]
    pub event_id: String,
    pub event_key: String,
    pub scope_kind: ScopeKind,
    pub scope_id: String,
    pub user_id: Option<String>,
    pub owner_user_id: Option<String>,
    pub profile_id: Option<String>,
    pub module_key: Option<String>,
    pub metadata_json: String,
    pub occurred_at_micros: i64,
}

/// How many invalid events one error names; the sender looks at the others in its next call.
const NAMED_MAX: usize = 100;

/// Store a batch: events whose `event_id` is there already are skipped, so that sending a batch twice changes nothing.
///
/// All or nothing: an invalid event refuses the batch with `event[INDEX].FIELD: REASON`, one for each, separated by `; `.
#[reducer]
pub fn record_tracking_events(ctx: &ReducerContext, events: Vec<TrackingEvent>) -> Result<(), String> {
    record(ctx, events).map(|_| ())
}

/// The same, and the number of events that were not there before.
#[cfg(feature = "v2")]
#[procedure]
pub fn record_tracking_events_counted(ctx: &mut ProcedureContext, events: Vec<TrackingEvent>) -> Result<u32, String> {
    ctx.try_with_tx(|tx| record(tx, events.clone()))
}

fn record(ctx: &ReducerContext, events: Vec<TrackingEvent>) -> Result<u32, String> {
    let problems: Vec<String> = events
        .iter()
        .enumerate()
        .filter_map(|(index, event)| problem(event).map(|(field, reason)| format!("event[{index}].{field}: {reason}")))
        .take(NAMED_MAX)
        .collect();
    if !problems.is_empty() {
        return Err(problems.join("; "));
    }
    let mut inserted = 0;
    for event in events {
        if ctx.db.tracking_event().event_id().find(&event.event_id).is_none() {
            ctx.db.tracking_event().insert(event);
            inserted += 1;
        }
    }
    Ok(inserted)
}

/// What no event may be: add what your application must be able to rely on.
fn problem(event: &TrackingEvent) -> Option<(&'static str, &'static str)> {
    let required = [
        ("event_id", &event.event_id),
        ("event_key", &event.event_key),
        ("scope_id", &event.scope_id),
        ("metadata_json", &event.metadata_json),
    ];
    required
        .into_iter()
        .find(|(_, text)| text.is_empty())
        .map(|(field, _)| (field, "must not be empty"))
}
